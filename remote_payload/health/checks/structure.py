"""How tensors fit together: shapes inside a layer, biases that a normalisation cancels, names for the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.header import CheckpointHeader, Role, TensorEntry
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.wire.results import Dimension, Finding, Severity

_NUMBER = re.compile(r"([0-9]+)$")
Module = dict[str, TensorEntry]


def modules(header: CheckpointHeader) -> dict[str, Module]:
    """The model's tensors by the module that holds them, in the state dict's order: leaf name → tensor."""
    found: dict[str, Module] = {}
    for tensor in header.model_tensors():
        module, _, leaf = tensor.name.rpartition(".")
        found.setdefault(module, {})[leaf] = tensor
    return found


def biases_before_norms(header: CheckpointHeader) -> dict[str, str]:
    """Every bias that stands directly in front of a BatchNorm → that BatchNorm's module."""
    every = modules(header)
    names = list(every)
    followers = dict(zip(names, names[1:]))
    numbered = _numbered_norms(every)
    pairs: dict[str, str] = {}
    for name, module in every.items():
        bias = module.get("bias")
        if bias is None or "weight" not in module or "running_var" in module or bias.role is not Role.BIAS:
            continue
        follower = followers.get(name, "")
        if _is_norm(every.get(follower), bias.numel):
            if _are_neighbours(name, follower):
                pairs[bias.name] = follower
            continue
        # fc1, fc2, bn1, bn2: listed by kind, belonging together by number.
        norm = numbered.get(_place(name), "")
        if _is_norm(every.get(norm), bias.numel):
            pairs[bias.name] = norm
    return pairs


def _numbered_norms(every: dict[str, Module]) -> dict[tuple[str, str], str]:
    return {_place(name): name for name, module in every.items() if "running_var" in module and _place(name)[1]}


def _place(name: str) -> tuple[str, str]:
    """A module's parent and the number at the end of its name, such as 2 of `fc2`; the number empty without both."""
    parent, _, own = name.rpartition(".")
    number = _NUMBER.search(own)
    return parent, number[1] if number is not None and number[1] != own else ""


def _is_norm(module: Optional[Module], width: int) -> bool:
    return module is not None and "running_var" in module and module["running_var"].numel == width


def _are_neighbours(name: str, follower: str) -> bool:
    """Of one parent; numbered ones of a Sequential only if nothing, such as an activation, stands between them."""
    parent, _, own = name.rpartition(".")
    other_parent, _, other = follower.rpartition(".")
    if parent != other_parent:
        return False
    return int(other) == int(own) + 1 if own.isdecimal() and other.isdecimal() else True


def _bias_before_norm(facts: HealthFacts) -> Iterator[Finding]:
    pairs = biases_before_norms(facts.header)
    if pairs:
        exact = [n for n in pairs if (stats := facts.scan.stats.get(n)) is not None and stats.zero_fraction == 1.0]
        yield Finding(
            id="structure.bias_before_norm",
            severity=Severity.INFO,
            title=f"{len(pairs)} biases stand in front of a BatchNorm, which cancels them",
            dimension=Dimension.NUMERICS,
            where=tuple(n[:200] for n in list(pairs)[:50]),
            evidence={
                "pairs": {b[:200]: n[:200] for b, n in list(pairs.items())[:30]},
                "still_exactly_zero": [n[:200] for n in exact[:30]],
            },
            explanation="A BatchNorm subtracts the mean of its input, and any constant with it: such a bias changes "
            "nothing, and its gradient is 0 but for rounding. That it is still 0 after training is no defect.",
            confidence=0.85,
            refuted_by="Something between the layer and the BatchNorm, such as an activation or a sum.",
            action="Build these layers with bias=False.",
        )


def _shape_mismatch(facts: HealthFacts) -> Iterator[Finding]:
    wrong: list[dict[str, Any]] = []
    for module in modules(facts.header).values():
        wrong.extend(_mismatches(module))
    if wrong:
        yield Finding(
            id="structure.shape_mismatch",
            severity=Severity.ERROR,
            title=f"{len(wrong)} tensors do not fit the layer that they belong to",
            dimension=Dimension.INTEGRITY,
            where=tuple(str(w["tensor"]) for w in wrong[:50]),
            evidence={"tensors": wrong[:20]},
            explanation="The tensors of one layer have widths that no such layer can have. Loading fails, or "
            "broadcasting hides it.",
            confidence=0.9,
            refuted_by="A layer of the user's own that is built like this.",
            action="Compare with the model's code; look for weights that were merged from two models.",
        )


def _mismatches(module: Module) -> Iterator[dict[str, Any]]:
    weight, bias = module.get("weight"), module.get("bias")
    if weight is None or not is_floating(weight.dtype):
        return
    if weight.role is Role.NORM_SCALE:
        for leaf in ("bias", "running_mean", "running_var"):
            other = module.get(leaf)
            if other is not None and other.shape != weight.shape:
                yield _mismatch(other, weight)
    elif weight.role is Role.WEIGHT_MATRIX and bias is not None and len(bias.shape) == 1:
        width = bias.shape[0]
        # Linear and Conv have their outputs first; GPT-2's Conv1D second; a transposed convolution second, by groups.
        grouped = len(weight.shape) > 2 and weight.shape[1] and width % weight.shape[1] == 0
        if width not in weight.shape[:2] and not grouped:
            yield _mismatch(bias, weight)


def _mismatch(tensor: TensorEntry, weight: TensorEntry) -> dict[str, Any]:
    return {"tensor": tensor.name[:200], "shape": list(tensor.shape), "weight_shape": list(weight.shape)}


def _tied(facts: HealthFacts) -> Iterator[Finding]:
    groups: dict[tuple[Any, ...], list[TensorEntry]] = {}
    for tensor in facts.header.model_tensors():
        if tensor.storage_key is not None and tensor.numel > 1:
            groups.setdefault((tensor.file, tensor.storage_key), []).append(tensor)
    tied, overlapping = [], []
    for members in groups.values():
        if len(members) > 1:
            tied.extend(_same(members))
            overlapping.extend(_overlaps(members))
    if tied or overlapping:
        yield Finding(
            id="structure.tied",
            severity=Severity.INFO,
            title=f"{len(tied)} tensors stand under several names"
            + (f"; {len(overlapping)} share part of their bytes with another" if overlapping else ""),
            dimension=Dimension.NUMERICS,
            where=tuple(" = ".join(names)[:200] for names in [*tied, *overlapping][:50]),
            evidence={"tied": [n[:10] for n in tied[:20]], "overlapping": [n[:10] for n in overlapping[:20]]},
            explanation="These names refer to the same bytes, as an embedding does that is also the output layer. "
            "They count once as parameters, and stay tied only if the model ties them after loading.",
            confidence=1.0,
            refuted_by="None: the file says so.",
            action="None, if the model ties them too.",
        )


def _same(members: list[TensorEntry]) -> list[list[str]]:
    names: dict[tuple[Any, ...], list[str]] = {}
    for t in members:
        names.setdefault((t.storage_offset, t.shape, t.stride, t.dtype), []).append(t.name)
    return [n for n in names.values() if len(n) > 1]


def _overlaps(members: list[TensorEntry]) -> list[list[str]]:
    placed = sorted(
        {(t.file_offset, t.span_bytes, t.shape, t.stride): t for t in members if t.file_offset is not None}.values(),
        key=lambda t: (t.file_offset or 0, t.span_bytes),
    )
    found = []
    for first, second in zip(placed, placed[1:]):
        if (second.file_offset or 0) < (first.file_offset or 0) + first.span_bytes:
            found.append([first.name, second.name])
    return found


def _has_model(facts: HealthFacts) -> bool:
    return facts.header.entry_count > 0


CHECKS = (
    Check(Dimension.INTEGRITY, "the shapes inside every layer", _shape_mismatch, _has_model, can_pass=False),
    Check(Dimension.NUMERICS, "biases in front of BatchNorm", _bias_before_norm, _has_model, can_pass=False),
    Check(Dimension.NUMERICS, "names for the same bytes", _tied, _has_model, can_pass=False),
)
