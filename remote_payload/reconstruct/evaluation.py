"""One evaluation from the checkpoint's header to findings, metrics and pictures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import torch

from remote_payload.checkpoint import CheckpointHeader, read_header
from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct import metrics, pictures
from remote_payload.reconstruct.adapters import adapter_config, calling, resolve_adapter
from remote_payload.reconstruct.arrangement import arrangement_finding
from remote_payload.reconstruct.baselines import Predictor, baseline_facts, simple_predictors, with_baselines
from remote_payload.reconstruct.collect import Collected
from remote_payload.reconstruct.feature_metrics import Extractor, extractors_of
from remote_payload.reconstruct.judge import Judgement, judge, overall
from remote_payload.reconstruct.loading import FittedModel, choose_dtype, fit_model
from remote_payload.reconstruct.measured import NEAREST, Evaluated, Metric
from remote_payload.reconstruct.prediction import BatchResult
from remote_payload.reconstruct.predictions import Predictions, prediction_store
from remote_payload.reconstruct.protocol import (
    Adapter,
    AdapterConfig,
    Kind,
    Modality,
    Sample,
)
from remote_payload.reconstruct.ranges import non_finite_finding, prediction_finding, target_finding
from remote_payload.reconstruct.runner import (
    ARITHMETIC,
    MemoryRanOutError,
    choose_positions,
    make_deterministic,
    pick_devices,
)
from remote_payload.reconstruct.split import declared_modalities, open_samples
from remote_payload.reconstruct.statistics import RowsLike
from remote_payload.reconstruct.training import Baselines, Shown, baselines_of, look_at_inputs
from remote_payload.reconstruct.voxel_metrics import voxelwise_map
from remote_payload.wire.codec import to_json
from remote_payload.wire.results import Finding, Outcome, Severity
from remote_payload.wire.states import Phase

SAMPLES_NAME = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class EvaluationOutcome:
    """What the document is made of. `facts` are its own keys, metrics and pictures among them."""

    headline: str
    task: Outcome
    findings: list[Finding]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class JudgedModality:
    """One modality's metrics and judgement. `errors` maps positions in the split to what samples are ranked by."""

    modality: Modality
    metrics: list[Metric]
    judgement: Judgement
    findings: list[Finding]
    evaluated: Optional[Evaluated] = None
    errors: dict[int, float] = dataclasses.field(default_factory=dict)


def evaluate(context: JobContext, adapter_name: str) -> EvaluationOutcome:
    """Load, run, measure, judge and draw.

    Raises `StructureError`, `AdapterError`, `CheckpointError`, and what torch raises when the device fails.
    """
    settings = context.plan.settings
    adapter = resolve_adapter(adapter_name)
    header = read_header(context.plan.checkpoint_path)
    config = adapter_config(settings, header.config)
    make_deterministic(settings.seed)
    context.progress(Phase.CUDA, message="asking torch for a device")
    devices = pick_devices(context.plan.gpu.device, context.plan.gpu.count)
    context.progress(Phase.LOAD, message="building the model")
    fitted = fit_model(adapter, config, header, choose_dtype(settings.dtype, header, devices[0]))
    modalities = declared_modalities(adapter, settings.data, config)
    samples = open_samples(adapter, settings.data, config)
    positions = choose_positions(len(samples), settings.metric_samples)
    reference = _reference(context, adapter, config)
    shown = _shown(context, samples, positions) if reference is not None else None
    baselines = _baselines(context, reference, modalities, shown)
    with (
        prediction_store(context, header, devices) as store,
        Predictions(context, adapter, fitted, header, devices, samples, positions, modalities, store) as predictions,
    ):
        collected, ran = _predict(context, adapter, predictions, modalities, len(positions), baselines)
    ordered = bool(samples[positions[0]].group)
    judged = []
    compared: list[dict[str, Any]] = []
    nearest: dict[str, RowsLike] = {}
    extractors = extractors_of(settings.features)
    for number, rows in enumerate(collected):
        counter = len(positions) + 2 * number
        context.progress(Phase.RUN, counter, None, f"baselines of {rows.modality.name}")
        predictors: list[Predictor] = []
        if rows.count:
            plain = rows.evaluated(baselines, ordered, adapter.dependence, settings.seed)
            predictors = simple_predictors(plain, rows.positions, shown, baselines, reference, context.artifacts)
            compared += baseline_facts(rows.modality.name, predictors)
            nearest.update((rows.modality.name, p.rows) for p in predictors if p.name == NEAREST and p.rows is not None)
        context.progress(Phase.RUN, counter + 1, None, f"measuring {rows.modality.name}")
        judged.append(
            judge_modality(rows, baselines, ordered, adapter.dependence, settings.seed, extractors, predictors)
        )
    drawn = _draw(context, collected, judged, samples, nearest)
    task, headline = overall([j.judgement for j in judged])
    # What is wrong with the file itself: it may have been readable all the same.
    findings = [f for f in header.problems if f.severity is not Severity.INFO]
    findings += [f for j in judged for f in j.findings] + _run_findings(ran, settings.batch_size, baselines)
    facts = {
        "metrics": [dataclasses.asdict(m) for j in judged for m in j.metrics],
        "pictures": drawn,
        "modalities": [_modality_facts(j) for j in judged],
        "baselines": compared,
        "model": _model_facts(fitted, header, devices),
        "samples": {
            "split": adapter.split,
            "available": len(samples),
            "evaluated": len(positions),
            "per_sample": f"{context.job}/{SAMPLES_NAME}",
            "training_reference": baselines.samples if baselines else None,
            "dependence": int(adapter.dependence),
        },
        "policy": {
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "weights_and_inputs": str(fitted.dtype).replace("torch.", ""),
            "predictions": ran.dtypes,
            "metrics": "float64",
            **ARITHMETIC,
        },
    }
    return EvaluationOutcome(headline, task, findings, facts)


def judge_modality(
    rows: Collected,
    baselines: Optional[Baselines],
    ordered: bool,
    dependence: int,
    seed: int,
    extractors: Sequence[Extractor] = (),
    predictors: Sequence[Predictor] = (),
) -> JudgedModality:
    """Ranges first; metrics and judgement only for what can be compared."""
    modality = rows.modality
    if not rows.count:
        return _unmeasured(modality, "no evaluated sample has this modality", [])
    targets, predictions = rows.targets, rows.predictions
    blocking = target_finding(modality, targets) or non_finite_finding(modality, predictions)
    if blocking is not None:
        failed = blocking.id == "task.non_finite_output"
        return _unmeasured(modality, blocking.title, [blocking], Outcome.FAIL if failed else Outcome.NOT_MEASURED)
    evaluated = with_baselines(rows.evaluated(baselines, ordered, dependence, seed), predictors, baselines)
    suspicion = prediction_finding(modality, targets, predictions)
    if suspicion is None or suspicion.severity is not Severity.ERROR:
        suspicion = arrangement_finding(modality, targets, predictions, evaluated.train_mean) or suspicion
    if suspicion is not None and suspicion.severity is Severity.ERROR:
        return _unmeasured(modality, suspicion.title, [suspicion])
    measured, evidence = metrics.measure(evaluated, extractors)
    judgement = judge(evidence)
    findings = [*judgement.findings, *([suspicion] if suspicion else [])]
    scores = metrics.sample_rows(evaluated)
    ranking = next(iter(scores[0]))
    sign = -1.0 if ranking == "code_accuracy" else 1.0
    errors = {position: sign * float(row[ranking] or 0.0) for position, row in zip(rows.positions, scores)}
    return JudgedModality(modality, measured, judgement, findings, evaluated, errors)


def _unmeasured(
    modality: Modality, reason: str, findings: list[Finding], outcome: Outcome = Outcome.NOT_MEASURED
) -> JudgedModality:
    word = "failed" if outcome is Outcome.FAIL else "not measured"
    judgement = Judgement(modality.name, modality.role, outcome, f"{modality.name}: {word}, {reason}")
    return JudgedModality(modality, metrics.not_measured(modality, reason), judgement, findings)


def _reference(context: JobContext, adapter: Adapter, config: AdapterConfig) -> Optional[Sequence[Sample]]:
    with calling("train_reference"):
        reference = adapter.train_reference(context.plan.settings.data, config)
        empty = reference is None or not len(reference)
    return None if empty else reference


def _shown(context: JobContext, samples: Sequence[Sample], positions: Sequence[int]) -> Shown:
    def told(done: int) -> None:
        context.progress(Phase.FIRST_BATCH, done, len(positions), "looking at the inputs")

    return look_at_inputs(samples, positions, context.plan.settings.seed, context.artifacts, told)


def _baselines(
    context: JobContext, reference: Optional[Sequence[Sample]], modalities: Sequence[Modality], shown: Optional[Shown]
) -> Optional[Baselines]:
    if reference is None or shown is None:
        return None

    def told(done: int) -> None:
        context.progress(Phase.FIRST_BATCH, done, len(reference), "reading the training reference")

    return baselines_of(reference, modalities, shown, context.artifacts, told)


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the run came to: the size of batches that memory held, and the type in which each modality was given."""

    batch_size: int
    dtypes: dict[str, str]


def _predict(
    context: JobContext,
    adapter: Adapter,
    predictions: Predictions,
    modalities: Sequence[Modality],
    count: int,
    baselines: Optional[Baselines],
) -> tuple[list[Collected], RunFacts]:
    """All results. Where memory did not hold a batch everything is predicted anew in smaller ones.

    So all samples come from batches of one size: it decides the last bits of numbers, which may not depend on which
    device ran out, or when.
    """
    batch_size = max(1, context.plan.settings.batch_size)
    while True:
        collected = [Collected(m, count, context.artifacts) for m in modalities]
        try:
            dtypes = _take_in(context, adapter, predictions.results(batch_size), count, collected, baselines)
        except MemoryRanOutError:
            batch_size //= 2
            context.progress(Phase.FIRST_BATCH, message=f"memory ran out; anew in batches of {batch_size}")
        else:
            return collected, RunFacts(batch_size, dtypes)


def _take_in(
    context: JobContext,
    adapter: Adapter,
    results: Iterable[BatchResult],
    count: int,
    collected: Sequence[Collected],
    baselines: Optional[Baselines],
) -> dict[str, str]:
    """Take in every batch; each sample's numbers are written as they come. Gives each prediction's element types."""
    settings = context.plan.settings
    context.progress(Phase.FIRST_BATCH, message="first batch")
    done = 0
    dtypes: dict[str, set[str]] = {}
    with open(context.artifacts / SAMPLES_NAME, "w", encoding="utf-8") as file:
        for result in results:
            lines: dict[int, dict[str, Any]] = {p: {} for p in result.positions}
            for rows in collected:
                dtypes.setdefault(rows.modality.name, set()).add(result.dtypes[rows.modality.name])
                rows.add_latents(result.samples, result.latents)
                added = rows.add(result.positions, result.samples, result.predicted[rows.modality.name])
                part = rows.evaluated(baselines, False, adapter.dependence, settings.seed, added)
                for row, numbers in zip(added, metrics.sample_rows(part)):
                    lines[rows.positions[row]][rows.modality.name] = numbers
            for position, sample in zip(result.positions, result.samples):
                line = {"index": position, "sample": sample.id, "modalities": lines[position]}
                file.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
            file.flush()
            done += len(result.positions)
            context.progress(Phase.RUN, done, count, "samples")
        os.fsync(file.fileno())
    return {name: ", ".join(sorted(found)) for name, found in dtypes.items()}


def _draw(
    context: JobContext,
    collected: Sequence[Collected],
    judged: Sequence[JudgedModality],
    samples: Sequence[Sample],
    nearest: Mapping[str, RowsLike],
) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    for number, verdict in enumerate(judged):
        if verdict.modality.kind is Kind.VOXELS and verdict.evaluated is not None:
            drawn += pictures.draw_voxels(verdict.evaluated, context.job, context.write_bytes)
            context.write_bytes(f"voxelwise_correlation_{number}.npy", voxelwise_map(verdict.evaluated))
    ranking = next((j.errors for j in judged if j.errors), {})
    shown = pictures.choose_shown(ranking, context.plan.settings.num_samples)
    share = pictures.share_of([rows.modality for rows in collected], len(shown))
    for number, chosen in enumerate(shown, start=1):
        for rows in collected:
            near = nearest.get(rows.modality.name)
            drawn += pictures.draw_sample(rows, samples, chosen, number, context.job, context.write_bytes, near, share)
        context.progress(Phase.RUN, number, len(shown), "pictures")
    return drawn


def _run_findings(ran: RunFacts, wanted_batch: int, baselines: Optional[Baselines]) -> list[Finding]:
    findings = []
    if ran.batch_size < wanted_batch:
        findings.append(
            Finding(
                id="reconstruct.batch_halved",
                severity=Severity.INFO,
                title=f"Memory ran out at a batch of {wanted_batch}; the run went on with {ran.batch_size}",
                evidence={"wanted": wanted_batch, "used": ran.batch_size},
                explanation="All samples were predicted anew in batches of the smaller size: the numbers are those of "
                f"a run with `batch_size: {ran.batch_size}`, whichever device ran out of memory and when.",
            )
        )
    if baselines is None:
        findings.append(
            Finding(
                id="reconstruct.no_train_reference",
                severity=Severity.WARNING,
                title="The adapter gives no training reference, so nothing is compared with the train mean",
                action="Return training samples from the adapter's train_reference.",
            )
        )
    return findings


def _modality_facts(judged: JudgedModality) -> dict[str, Any]:
    modality = judged.modality
    return {
        "name": modality.name,
        "kind": modality.kind.value,
        "role": modality.role.value,
        "layout": modality.layout,
        "shape": [int(side) for side in modality.shape],
        "value_range": [float(v) for v in modality.value_range] if modality.value_range else None,
        "unit": modality.unit,
        "label": modality.label,
        "outcome": judged.judgement.outcome.value,
        "sentence": judged.judgement.sentence,
    }


def _model_facts(fitted: FittedModel, header: CheckpointHeader, devices: Sequence[torch.device]) -> dict[str, Any]:
    return {
        "entries": fitted.entries,
        "parameters": fitted.parameters,
        "tied_names": fitted.tied,
        "dtype": str(fitted.dtype).replace("torch.", ""),
        "device": devices[0].type,
        "dropped_entries": to_json(fitted.fit.dropped[:40]),
        "state_path": header.state_path,
    }
