"""Weights straight from the mapped file to the device: the model is built without memory, then filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Callable, Optional

import torch
from torch import nn

from remote_payload.checkpoint import CheckpointHeader
from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.reconstruct.adapters import calling
from remote_payload.reconstruct.protocol import Adapter, AdapterConfig, AdapterError
from remote_payload.reconstruct.structure import Expected, Fit, compare, expected_entries, fit_findings
from remote_payload.wire.results import Dimension, Finding, Severity

Progress = Callable[[int, int], None]


class StructureError(Exception):
    """The checkpoint does not fill the model. `findings` say how."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f.title for f in findings))
        self.findings = tuple(findings)


@dataclasses.dataclass(frozen=True)
class FittedModel:
    """The model, on the meta device until it is filled, and how the checkpoint fits it.

    `tied` counts names that share another name's tensor.
    """

    model: nn.Module
    fit: Fit
    expected: tuple[Expected, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        return len(self.expected)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tied(self) -> int:
        return len(self.expected) - len({e.tie for e in self.expected})


def build_on_meta(adapter: Adapter, config: AdapterConfig) -> nn.Module:
    """The adapter's model on the meta device: shapes without memory."""
    with calling("build_model"), torch.device("meta"):
        model = adapter.build_model(config)
    if not isinstance(model, nn.Module):
        raise AdapterError(f"the adapter's build_model gave a {type(model).__name__}, not an nn.Module")
    return model


def fit_of(adapter: Adapter, model: nn.Module, header: CheckpointHeader) -> Fit:
    """How the checkpoint's entries fit the model's, by the adapter's names."""
    names = [t.name for t in header.model_tensors()]
    with calling("map_state_dict"):
        mapping = adapter.map_state_dict(names)
    return compare(expected_entries(model), header, mapping)


def choose_dtype(setting: str, header: CheckpointHeader, device: torch.device) -> torch.dtype:
    """The one floating type of all weights and inputs.

    auto takes the type that most of the checkpoint's weights are stored in, except float16 on a CPU, which lacks many
    of its operations: float32 then. float32, bfloat16 and float16 are taken as said.
    """
    if setting != "auto":
        named: torch.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting]
        return named
    elements: dict[str, int] = {}
    for tensor in header.model_tensors():
        if is_floating(tensor.dtype):
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel
    commonest = max(elements, key=lambda name: elements[name], default="float32")
    stored = getattr(torch, commonest, torch.float32)
    if stored not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return torch.float32
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def fit_model(adapter: Adapter, config: AdapterConfig, header: CheckpointHeader, dtype: torch.dtype) -> FittedModel:
    """Build on meta and check the fit. Raises `StructureError` when anything is missing, unexpected or misshapen,
    `AdapterError`."""
    if not header.model_tensors():
        raise StructureError([_no_model(header)])
    model = build_on_meta(adapter, config)
    fit = fit_of(adapter, model, header)
    if not fit.is_sound:
        raise StructureError(fit_findings(fit))
    return FittedModel(model, fit, tuple(expected_entries(model)), dtype)


def fill_model(
    fitted: FittedModel,
    adapter: Adapter,
    header: CheckpointHeader,
    device: torch.device,
    progress: Optional[Progress] = None,
) -> nn.Module:
    """Fill the model on the device, entry by entry, and put it into evaluation mode.

    Host memory holds one tensor at a time when the device is a GPU. Raises `StructureError` when anything is left
    uninitialised, `CheckpointError` for bytes that are not there, `AdapterError`.
    """
    model = fitted.model
    _fill(fitted, header, device, progress)
    with calling("finish_model"):
        adapter.finish_model(model)
    left = uninitialised(model)
    if left:
        raise StructureError([_uninitialised_finding(left)])
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    return model


def load_model(
    adapter: Adapter,
    config: AdapterConfig,
    header: CheckpointHeader,
    device: torch.device,
    dtype: torch.dtype,
    progress: Optional[Progress] = None,
) -> FittedModel:
    """`fit_model`, then `fill_model`."""
    fitted = fit_model(adapter, config, header, dtype)
    fill_model(fitted, adapter, header, device, progress)
    return fitted


def uninitialised(model: nn.Module) -> list[str]:
    """Names of parameters, buffers and plain tensor attributes that are still on the meta device."""
    names = [n for n, p in model.named_parameters() if p.is_meta]
    names += [n for n, b in model.named_buffers() if b.is_meta]
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                names.append(f"{prefix}.{name}" if prefix else name)
    return sorted(set(names))


def _fill(fitted: FittedModel, header: CheckpointHeader, device: torch.device, progress: Optional[Progress]) -> None:
    loaded: dict[int, torch.Tensor] = {}
    sources = fitted.fit.sources
    source_of_tie = {e.tie: sources[e.name] for e in reversed(fitted.expected) if e.name in sources}
    for position, entry in enumerate(fitted.expected):
        if entry.tie not in loaded:
            tensor = load_tensor(header, source_of_tie[entry.tie], device)
            tensor = tensor.to(fitted.dtype) if tensor.is_floating_point() else tensor
            loaded[entry.tie] = nn.Parameter(tensor, requires_grad=False) if entry.is_parameter else tensor
        _assign(fitted.model, entry.name, loaded[entry.tie])
        if progress is not None:
            progress(position + 1, len(fitted.expected))


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    # Assigned in place of the meta tensor; setattr would refuse a parametrised module's original.
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor


def _no_model(header: CheckpointHeader) -> Finding:
    return Finding(
        id="structure.no_model",
        severity=Severity.ERROR,
        title="No state dict of a model was found in the checkpoint",
        dimension=Dimension.INTEGRITY,
        evidence={"keys": sorted(header.plain)[:40]},
        action="Name a checkpoint that holds the model's weights.",
    )


def _uninitialised_finding(names: Sequence[str]) -> Finding:
    return Finding(
        id="structure.uninitialised",
        severity=Severity.ERROR,
        title=f"{len(names)} tensors of the model are in no checkpoint and were not filled",
        dimension=Dimension.INTEGRITY,
        where=tuple(names[:40]),
        explanation="The model computes them when it is built (non-persistent buffers, plain tensors), and it is built "
        "without memory.",
        action="Fill them in the adapter's finish_model.",
    )
