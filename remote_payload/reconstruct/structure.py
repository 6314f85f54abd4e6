"""Does the checkpoint fit the model: names and shapes, before a byte of a tensor is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from remote_payload.checkpoint import CheckpointHeader
from remote_payload.wire.names import printable
from remote_payload.wire.results import Dimension, Finding, Severity

if TYPE_CHECKING:
    from torch import nn

_MANY = 40


@dataclasses.dataclass(frozen=True)
class Expected:
    """One entry of the model's state dict. Entries of one `tie` are the same tensor."""

    name: str
    shape: tuple[int, ...]
    is_parameter: bool
    tie: int


@dataclasses.dataclass(frozen=True)
class Fit:
    """The comparison. `sources` maps each model name to the checkpoint's tensor that fills it."""

    sources: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(model name, shape in the model, shape in the checkpoint)."""
    ambiguous: tuple[str, ...] = ()
    """Model names that more than one checkpoint entry is mapped to."""
    dropped: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.ambiguous)


def expected_entries(model: nn.Module) -> tuple[Expected, ...]:
    """The model's persistent parameters and buffers, tied ones marked by a common number."""
    parameters = {id(p) for p in model.parameters()}
    numbers: dict[int, int] = {}
    entries = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        tie = numbers.setdefault(id(tensor), len(numbers))
        entries.append(Expected(name, tuple(tensor.shape), id(tensor) in parameters, tie))
    return tuple(entries)


def compare(expected: Sequence[Expected], header: CheckpointHeader, mapping: Mapping[str, Optional[str]]) -> Fit:
    """Match the checkpoint's model entries, renamed by `mapping`, with the model's.

    A tied parameter is there if any of its names is.
    """
    by_name = {e.name: e for e in expected}
    sources: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unexpected, ambiguous, dropped = [], [], []
    for tensor in header.model_tensors():
        target = mapping.get(tensor.name, tensor.name)
        if target is None:
            dropped.append(tensor.name)
        elif target not in by_name:
            unexpected.append(tensor.name)
        elif target in sources:
            ambiguous.append(target)
        else:
            sources[target] = tensor.name
            shapes[target] = tensor.shape
    filled_ties = {by_name[name].tie for name in sources}
    missing = [e.name for e in expected if e.tie not in filled_ties]
    misshapen = [(n, by_name[n].shape, s) for n, s in shapes.items() if by_name[n].shape != s]
    return Fit(sources, tuple(missing), tuple(unexpected), tuple(misshapen), tuple(ambiguous), tuple(dropped))


def fit_findings(fit: Fit) -> list[Finding]:
    """One finding for each way in which model and checkpoint differ; none if they fit."""
    findings = []
    if fit.misshapen:
        name, wanted, stored = fit.misshapen[0]
        findings.append(
            _finding(
                "structure.shape_mismatch",
                f"{len(fit.misshapen)} entries have another shape in the checkpoint than in the model",
                [m[0] for m in fit.misshapen],
                {
                    "entries": [
                        {"name": printable(n), "model": list(m), "checkpoint": list(c)}
                        for n, m, c in fit.misshapen[:_MANY]
                    ],
                    "count": len(fit.misshapen),
                },
                f"{printable(name)} is {_shape(stored)} in the checkpoint and {_shape(wanted)} in the model.",
                "Build the model with the sizes that the checkpoint was trained with.",
            )
        )
    lists = (
        ("structure.missing_entries", fit.missing, "entries of the model are not in the checkpoint"),
        ("structure.unexpected_entries", fit.unexpected, "entries of the checkpoint are not in the model"),
        ("structure.ambiguous_entries", fit.ambiguous, "entries of the model are mapped to more than once"),
    )
    for identifier, names, sentence in lists:
        if names:
            findings.append(
                _finding(
                    identifier,
                    f"{len(names)} {sentence}",
                    names,
                    {"count": len(names)},
                    f"The first is {printable(names[0])}.",
                    "Map the names in the adapter's map_state_dict (None drops an entry on purpose), or build the "
                    "model that the checkpoint belongs to.",
                )
            )
    return findings


def _finding(
    identifier: str, title: str, where: Sequence[str], evidence: dict[str, object], explanation: str, action: str
) -> Finding:
    return Finding(
        id=identifier,
        severity=Severity.ERROR,
        title=title,
        dimension=Dimension.INTEGRITY,
        where=tuple(printable(name) for name in where[:_MANY]),
        evidence=evidence,
        explanation=explanation,
        action=action,
    )


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(side) for side in shape) or "a single number"
