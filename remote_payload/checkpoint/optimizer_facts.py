"""The optimizer's state: its kind, and which of the model's parameters each of its entries belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from remote_payload.checkpoint.header import OptimizerFacts, Role
from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.plain import PlainValues, key_text
from remote_payload.checkpoint.tree import strip_prefixes

_BUFFERS = frozenset({Role.RUNNING_MEAN, Role.RUNNING_VAR, Role.COUNTER})
_MAX_GROUPS = 1000
_MOST_STEPS = 1 << 62


def describe_optimizer(
    path: str,
    state_dict: Mapping[Any, Any],
    model: Mapping[str, TensorRef],
    roles: Mapping[str, Role],
    plain: PlainValues,
    single_values: Mapping[int, Any],
) -> OptimizerFacts:
    """Facts of one optimizer state dict. `single_values` gives the numbers of one-element tensors by identity."""
    state = {key_text(k): v for k, v in state_dict["state"].items() if isinstance(v, dict)}
    groups = [g for g in _as_list(state_dict.get("param_groups")) if isinstance(g, dict)][:_MAX_GROUPS]
    indices = [key_text(i) for g in groups for i in _as_list(g.get("params"))] or list(state)
    names, mapping = _map_parameters(indices, _named(groups), state, model, roles)
    return OptimizerFacts(
        kind=_kind(state, groups),
        path=path,
        state_count=len(state),
        parameter_count=len(indices),
        parameters=names,
        mapping=mapping,
        groups=tuple(plain.convert({k: v for k, v in g.items() if k not in ("params", "param_names")}) for g in groups),
        steps=_steps(state, single_values),
        without_state=tuple(names.get(i, i) for i in indices if i not in state)[:1000],
        parameter_groups=_group_of_each(groups) if len(groups) > 1 else {},
    )


def _group_of_each(groups: Sequence[Mapping[Any, Any]]) -> dict[str, int]:
    return {key_text(i): n for n, g in enumerate(groups) for i in _as_list(g.get("params"))}


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _named(groups: Sequence[Mapping[Any, Any]]) -> list[str]:
    return [key_text(n) for g in groups for n in _as_list(g.get("param_names"))]


def _kind(state: Mapping[str, Mapping[Any, Any]], groups: Sequence[Mapping[Any, Any]]) -> str:
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


def _steps(state: Mapping[str, Mapping[Any, Any]], single_values: Mapping[int, Any]) -> tuple[Any, ...]:
    steps = set()
    for entry in state.values():
        step = entry.get("step")
        if isinstance(step, TensorRef):
            step = single_values.get(id(step))
        # NaN and infinities are no counts, and no JSON either.
        if isinstance(step, (int, float)) and -_MOST_STEPS < step < _MOST_STEPS:
            steps.add(step)
    return tuple(sorted(steps))[:100]


def _map_parameters(
    indices: list[str],
    given_names: list[str],
    state: Mapping[str, Mapping[Any, Any]],
    model: Mapping[str, TensorRef],
    roles: Mapping[str, Role],
) -> tuple[dict[str, str], str]:
    """torch numbers parameters in the order of its groups; only an order that fits every shape is believed."""
    if len(given_names) == len(indices) and indices:
        bare = strip_prefixes(given_names)[0]
        return {i: bare[n] if bare[n] in model else n for i, n in zip(indices, given_names)}, "by_name"
    # Wrappers' prefixes stand in an optimizer's names whenever they stand in the model's.
    bare = strip_prefixes(indices)[0]
    if indices and all(bare[i] in model for i in indices):
        return {i: bare[i] for i in indices}, "by_name"
    trainable = [n for n, role in roles.items() if role not in _BUFFERS]
    matrices = [n for n in trainable if len(model[n].shape) >= 2]
    vectors = [n for n in trainable if len(model[n].shape) < 2]
    for names, mapping in (
        (trainable, "by_order"),
        (_distinct(trainable, model), "by_order"),
        (matrices + vectors, "by_order_matrices_first"),
        (vectors + matrices, "by_order_vectors_first"),
    ):
        if len(names) == len(indices) and all(_fits(state.get(i), model[n]) for i, n in zip(indices, names)):
            return dict(zip(indices, names)), mapping
    return {}, "not_derivable"


def _distinct(names: list[str], model: Mapping[str, TensorRef]) -> list[str]:
    """Tied weights are one parameter to an optimizer, however many names they have."""
    seen, kept = set(), []
    for name in names:
        identity = tensor_identity(model[name])
        if identity not in seen:
            seen.add(identity)
            kept.append(name)
    return kept


def tensor_identity(tensor: TensorRef) -> tuple[Any, ...]:
    """Equal for two names of the same elements."""
    if tensor.storage is None:
        return (id(tensor),)
    return (tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, tensor.stride)


def _fits(entry: Optional[Mapping[Any, Any]], parameter: TensorRef) -> bool:
    if entry is None:
        return True
    moments = [entry.get(k) for k in ("exp_avg", "momentum_buffer", "square_avg", "sum")]
    return all(not isinstance(m, TensorRef) or m.shape == parameter.shape for m in moments)
