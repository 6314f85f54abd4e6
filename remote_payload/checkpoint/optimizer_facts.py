"""The optimizers' state: their kinds, and which of the model's parameters each of their entries belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.header import OptimizerFacts, Role
from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.parameter_match import Entry, Match, Parameter, match_optimizers
from remote_payload.checkpoint.plain import PlainValues, key_text
from remote_payload.checkpoint.tree import Path, strip_prefixes

_BUFFERS = frozenset({Role.RUNNING_MEAN, Role.RUNNING_VAR, Role.COUNTER})
_MAX_GROUPS = 1000
_MOST_STEPS = 1 << 62
_SHAPED = ("exp_avg", "momentum_buffer", "square_avg", "sum")
State = Mapping[str, Mapping[Any, Any]]


def describe_optimizers(
    found: Sequence[tuple[Path, Mapping[Any, Any]]],
    model: Mapping[str, TensorRef],
    roles: Mapping[str, Role],
    plain: PlainValues,
    single_values: Mapping[int, Any],
) -> tuple[OptimizerFacts, ...]:
    """Facts of a file's optimizer state dicts. `single_values` gives the numbers of one-element tensors by identity."""
    read = [_read(path, state_dict) for path, state_dict in found]
    by_name = [_by_name(optimizer, model) for optimizer in read]
    named = {name for names in by_name if names for name in names.values()}
    trainable = [
        Parameter(n, t.shape, tensor_identity(t))
        for n, t in model.items()
        if roles[n] not in _BUFFERS and is_floating(t.dtype) and n not in named
    ]
    unnamed = iter(match_optimizers([o.entries for o, names in zip(read, by_name) if not names], trainable))
    matches = [Match(names, "by_name") if names else next(unnamed) for names in by_name]
    return tuple(_describe(o, m, plain, single_values) for o, m in zip(read, matches))


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    """An optimizer's state dict, its entries in the order of its groups."""

    path: str
    state: State
    groups: Sequence[Mapping[Any, Any]]
    indices: list[str]
    entries: list[list[Entry]]


def _read(path: Path, state_dict: Mapping[Any, Any]) -> _Optimizer:
    state = {key_text(k): v for k, v in state_dict["state"].items() if isinstance(v, dict)}
    groups = [g for g in _as_list(state_dict.get("param_groups")) if isinstance(g, dict)][:_MAX_GROUPS]
    indices = [key_text(i) for g in groups for i in _as_list(g.get("params"))]
    in_groups = [[key_text(i) for i in _as_list(g.get("params"))] for g in groups] if indices else [list(state)]
    entries = [[Entry(i, _shape(state.get(i))) for i in group] for group in in_groups if group]
    return _Optimizer("/".join(path), state, groups, indices or list(state), entries)


def _shape(entry: Optional[Mapping[Any, Any]]) -> Optional[tuple[int, ...]]:
    moments = [entry.get(k) for k in _SHAPED] if entry else []
    return next((m.shape for m in moments if isinstance(m, TensorRef)), None)


def _by_name(optimizer: _Optimizer, model: Mapping[str, TensorRef]) -> dict[str, str]:
    """Names that the optimizer keeps itself, empty if it keeps none."""
    indices, given = optimizer.indices, _named(optimizer.groups)
    if indices and len(given) == len(indices):
        bare = strip_prefixes(given)[0]
        return {i: bare[n] if bare[n] in model else n for i, n in zip(indices, given)}
    # Wrappers' prefixes stand in an optimizer's names whenever they stand in the model's.
    bare = strip_prefixes(indices)[0]
    return {i: bare[i] for i in indices} if all(bare[i] in model for i in indices) else {}


def _describe(
    optimizer: _Optimizer, match: Match, plain: PlainValues, single_values: Mapping[int, Any]
) -> OptimizerFacts:
    state, groups, names = optimizer.state, optimizer.groups, match.names
    shown = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    return OptimizerFacts(
        kind=_kind(state, groups),
        path=optimizer.path,
        state_count=len(state),
        parameter_count=len(optimizer.indices),
        parameters=dict(names),
        mapping=match.mapping,
        groups=tuple(plain.convert(g) for g in shown),
        steps=_steps(state, single_values),
        without_state=tuple(names.get(i, i) for i in optimizer.indices if i not in state)[:1000],
        parameter_groups=_group_of_each(groups) if len(groups) > 1 else {},
    )


def _group_of_each(groups: Sequence[Mapping[Any, Any]]) -> dict[str, int]:
    return {key_text(i): n for n, g in enumerate(groups) for i in _as_list(g.get("params"))}


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _named(groups: Sequence[Mapping[Any, Any]]) -> list[str]:
    return [key_text(n) for g in groups for n in _as_list(g.get("param_names"))]


def _kind(state: State, groups: Sequence[Mapping[Any, Any]]) -> str:
    keys = {key_text(k) for s in list(state.values())[:50] for k in s}
    if {"exp_avg", "exp_avg_sq"} <= keys:
        decoupled = {g.get("decoupled_weight_decay") for g in groups}
        if decoupled == {True}:
            return "AdamW"
        return "Adam" if decoupled == {False} else "Adam or AdamW"
    for mark, kind in (
        ("exp_avg_sq_row", "Adafactor"),
        ("exp_inf", "Adamax"),
        ("acc_delta", "Adadelta"),
        ("square_avg", "RMSprop"),
        ("sum", "Adagrad"),
        ("momentum_buffer", "SGD with momentum"),
        ("exp_avg", "Lion"),
    ):
        if mark in keys:
            return kind
    return "SGD" if groups and not state else "unknown"


def _steps(state: State, single_values: Mapping[int, Any]) -> tuple[Any, ...]:
    steps = set()
    for entry in state.values():
        step = entry.get("step")
        if isinstance(step, TensorRef):
            step = single_values.get(id(step))
        # NaN and infinities are no counts, and no JSON either.
        if isinstance(step, (int, float)) and -_MOST_STEPS < step < _MOST_STEPS:
            steps.add(step)
    return tuple(sorted(steps))[:100]


def tensor_identity(tensor: TensorRef) -> tuple[Any, ...]:
    """Equal for two names of the same elements."""
    if tensor.storage is None:
        return (id(tensor),)
    return (tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, tensor.stride)
