"""Does the adapter fit the checkpoint and the data, told before anything large is read.

The model is built on the meta device and compared with the header; then one real sample is looked at, and a small
enough model is run on it, on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

import torch
from torch import nn

from remote_payload.checkpoint import CheckpointHeader
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.reconstruct.adapters import AdapterCallError, adapter_config, calling, resolve_adapter
from remote_payload.reconstruct.collect import check_predictions
from remote_payload.reconstruct.loading import StructureError, build_on_meta, choose_dtype, fit_of, load_model
from remote_payload.reconstruct.prediction import as_array
from remote_payload.reconstruct.protocol import (
    Adapter,
    AdapterConfig,
    AdapterError,
    Modality,
    Sample,
    signature_problem,
)
from remote_payload.reconstruct.ranges import check_shape, prediction_finding, target_finding
from remote_payload.reconstruct.runner import predict
from remote_payload.reconstruct.split import declared_modalities, open_samples
from remote_payload.reconstruct.structure import fit_findings
from remote_payload.wire.names import printable
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.results import Dimension, Finding, Severity

DRY_RUN_PARAMETERS = 100_000_000
"""Larger models are not loaded for a look: that is the run's business."""
_DRY_RUN_BATCH = 2
"""One sample twice: some layers refuse a batch of one."""


def check(plan: NodePlan, header: CheckpointHeader, told: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """What keeps `reconstruct` from running; an error refuses the run. Nothing without an adapter.

    Code of the adapter that raises is a finding, never an exception. `told` hears what was looked at and is well.
    """
    settings = plan.settings
    if settings.adapter is None:
        return []
    findings: list[Finding] = []
    with _collecting(findings):
        adapter = resolve_adapter(settings.adapter)
        told("import")
        config = adapter_config(settings, header.config)
        findings += _signature_findings(adapter, settings.data, config)
        findings += _data_findings(adapter, settings.data)
        if any(f.severity is Severity.ERROR for f in findings):
            return findings
        told("signatures")
        model = build_on_meta(adapter, config)
        told("model on the meta device")
        findings += _structure_findings(adapter, model, header)
        if not findings:
            told("shapes against the checkpoint")
        findings += _sample_findings(plan, header, adapter, config, model, not findings, told)
    return findings


def _signature_findings(adapter: Adapter, data: dict[str, str], config: AdapterConfig) -> list[Finding]:
    calls: Sequence[tuple[Any, tuple[Any, ...]]] = (
        (adapter.build_model, (config,)),
        (adapter.map_state_dict, ([],)),
        (adapter.modalities, (data, config)),
        (adapter.samples, (adapter.split, data, config)),
        (adapter.collate, ([],)),
        (adapter.predict, (None, None)),
        (adapter.train_reference, (data, config)),
        (adapter.finish_model, (None,)),
    )
    problems = [p for p in (signature_problem(method, *arguments) for method, arguments in calls) if p]
    return [
        _error(
            "adapter.signature_mismatch",
            f"A method of the adapter does not take what it is called with: {problem}",
            "Give the method the parameters that remote_payload/reconstruct/protocol.py documents.",
        )
        for problem in problems
    ]


def _data_findings(adapter: Adapter, data: dict[str, str]) -> list[Finding]:
    missing = [name for name in adapter.data_names if name not in data]
    if not missing:
        return []
    return [
        _error(
            "adapter.data_missing",
            f"The config's data lacks {', '.join(missing)}",
            "Add the paths under `data:` in the config.",
            {"wanted": list(adapter.data_names), "given": sorted(data)},
        )
    ]


def _structure_findings(adapter: Adapter, model: nn.Module, header: CheckpointHeader) -> list[Finding]:
    if not header.model_tensors():
        return [_error("structure.no_model", "No state dict of a model was found in the checkpoint", "")]
    return fit_findings(fit_of(adapter, model, header))


def _sample_findings(
    plan: NodePlan,
    header: CheckpointHeader,
    adapter: Adapter,
    config: AdapterConfig,
    model: nn.Module,
    is_sound: bool,
    told: Callable[[str], None],
) -> list[Finding]:
    data = plan.settings.data
    modalities = declared_modalities(adapter, data, config)
    samples = open_samples(adapter, data, config)
    told(f"{len(samples)} samples of the split {adapter.split!r}")
    with calling("samples"):
        sample = samples[0]
    findings = _check_targets(modalities, sample)
    if findings:
        return findings
    told(f"layout and range of one sample: {', '.join(m.name for m in modalities)}")
    parameters = sum(p.numel() for p in model.parameters())
    if not is_sound:
        told("dry run left out: the checkpoint does not fill the model")
        return findings
    if parameters > DRY_RUN_PARAMETERS:
        told(f"dry run left out: {parameters:,} parameters are loaded only for the run itself")
        return findings
    # A checkpoint that is yet to be sent has its header here and no tensors.
    has_weights = all(os.path.exists(file.path) for file in header.files)
    findings = _dry_run(plan, header, adapter, config, modalities, sample, has_weights)
    if not any(f.severity is Severity.ERROR for f in findings):
        told(f"dry run of one sample{'' if has_weights else ', with weights as initialised'}")
    return findings


def _check_targets(modalities: Sequence[Modality], sample: Sample) -> list[Finding]:
    unknown = sorted(set(sample.targets) - {m.name for m in modalities})
    if unknown:
        raise AdapterError(f"a sample has targets that are no declared modality: {', '.join(unknown)}")
    findings = []
    for modality in modalities:
        if modality.name in sample.targets:
            target = as_array(sample.targets[modality.name])
            check_shape("target", modality, target)
            found = target_finding(modality, target)
            findings += [found] if found is not None else []
    return findings


def _dry_run(
    plan: NodePlan,
    header: CheckpointHeader,
    adapter: Adapter,
    config: AdapterConfig,
    modalities: Sequence[Modality],
    sample: Sample,
    has_weights: bool,
) -> list[Finding]:
    device = torch.device("cpu")
    dtype = choose_dtype(plan.settings.dtype, header, device)
    if has_weights:
        model = load_model(adapter, config, header, device, dtype).model
    else:
        model = _as_initialised(adapter, config, dtype)
    predicted = predict(adapter, model, [sample] * _DRY_RUN_BATCH, device, dtype)
    check_predictions(predicted, modalities)
    findings = []
    for modality in modalities:
        given = as_array(predicted[modality.name])
        check_shape("prediction", modality, given, _DRY_RUN_BATCH)
        if has_weights and modality.name in sample.targets:
            found = prediction_finding(modality, as_array(sample.targets[modality.name]), given)
            findings += [found] if found is not None else []
    return findings


def _as_initialised(adapter: Adapter, config: AdapterConfig, dtype: torch.dtype) -> nn.Module:
    with calling("build_model"):
        model: nn.Module = adapter.build_model(config)
    with calling("finish_model"):
        adapter.finish_model(model)
    return model.to(dtype).eval()


@contextlib.contextmanager
def _collecting(findings: list[Finding]) -> Iterator[None]:
    """Turns what the adapter or the file cannot do into findings."""
    try:
        yield
    except StructureError as error:
        findings.extend(error.findings)
    except AdapterCallError as error:
        findings.append(_error(f"adapter.{error.method}_failed", str(error), "Mend the adapter.", cause=error))
    except AdapterError as error:
        findings.append(_error("adapter.mismatch", str(error), "Mend the adapter or the config."))
    except CheckpointError as error:
        findings.append(_error("reconstruct.checkpoint_unreadable", str(error), error.action))
    except MemoryError:
        findings.append(_error("reconstruct.out_of_memory", "The dry run of one sample ran out of memory", ""))
    except Exception as error:  # noqa: BLE001 - what an adapter gives back may be anything, and break where it is used
        words = f"{type(error).__name__}: {printable(str(error))[:1000]}"
        told = f"What the adapter's methods give back cannot be used: {words}"
        frames = traceback.extract_tb(error.__traceback__)
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        action = "Compare what each method gives back with remote_payload/reconstruct/protocol.py."
        findings.append(_error("adapter.unusable_result", told, action, {"raised_at": at}))


def _error(
    identifier: str,
    title: str,
    action: str,
    evidence: Optional[dict[str, Any]] = None,
    cause: Optional[AdapterCallError] = None,
) -> Finding:
    numbers = dict(evidence or {})
    if cause is not None:
        numbers["raised_at"] = cause.raised_at
    return Finding(
        id=identifier,
        severity=Severity.ERROR,
        title=title,
        dimension=Dimension.INTEGRITY if identifier.startswith("structure.") else None,
        evidence=numbers,
        action=action,
    )
