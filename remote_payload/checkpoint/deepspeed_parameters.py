"""Puts parameters together from ZeRO's flat partitions: float32 weights and moments by name. Pure.

The facts of the format. Stages 1 and 2: of each parameter group the parameters lie one behind the other in one vector,
padded at its end and cut into one range for each rank. Stage 3: each parameter is cut into one range for each rank, all
of one length, the last padded; on a rank the ranges lie one behind the other, over all of its groups.
`param_shapes` of the model states has names and shapes in that order, one mapping for each group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.placement import contiguous_stride

MASTER = "master_param"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_DIMENSIONS = 64
_MAX_PIECES = 2_000_000
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_STATES = ("base_optimizer_state", "optimizer_state_dict")

Shapes = list[dict[str, tuple[int, ...]]]
Cut = Callable[[Sequence[Sequence[TensorRef]]], Optional[dict[str, TensorRef]]]


@dataclasses.dataclass(frozen=True)
class Assembled:
    """Tensors by parameter: weights in float32, and the optimizer's state dict as torch would have saved it by name."""

    masters: dict[str, TensorRef]
    optimizer: dict[str, Any]


def assemble(root: dict[Any, Any], partitions: Sequence[object], stage: int) -> Union[Assembled, str]:
    """The parameters of one tensor-parallel slice, from every rank's partition in order; or why they cannot be told."""
    shapes = _shapes(root.get("param_shapes"))
    if shapes is None:
        return "the model states hold no shapes of the parameters"
    if sum(map(len, shapes)) * len(partitions) > _MAX_PIECES:
        return "there are too many parameters and ranks"
    ranks = [_rank(p) for p in partitions]
    if not ranks or None in ranks:
        return "a partition holds no flat float32 weights"
    known = [r for r in ranks if r is not None]
    cut: Cut = (lambda vectors: _one_range_each(shapes, vectors)) if stage == 3 else (lambda v: _in_rows(shapes, v))
    masters = cut([r.masters for r in known])
    if masters is None:
        return "the partitions are not as long as the parameters need"
    moments = {}
    for name in _MOMENTS:
        vectors = [r.moment(name) for r in known]
        found = cut([v for v in vectors if v is not None]) if None not in vectors else None
        if found is not None:
            moments[name] = found
    steps = {n: s for shape, s in zip(shapes, known[0].steps(len(shapes))) for n in shape}
    state = {
        name: {
            **({"step": steps[name]} if steps.get(name) is not None else {}),
            MASTER: masters[name],
            **{moment: found[name] for moment, found in moments.items()},
        }
        for name in masters
    }
    settings = known[0].settings(len(shapes))
    groups = [{**s, "params": [n for n in shape if n in masters]} for s, shape in zip(settings, shapes)]
    return Assembled(masters, {"state": state, "param_groups": groups})


@dataclasses.dataclass(frozen=True)
class _Rank:
    masters: list[TensorRef]
    state: dict[Any, Any]
    groups: list[dict[Any, Any]]

    def moment(self, name: str) -> Optional[list[TensorRef]]:
        """One flat tensor for each of the masters, as long as it; None where one is missing.

        Of the masters DeepSpeed saves no padding, of the moments all of it.
        """
        entries = [self.state.get(i) for i in range(len(self.masters))]
        found = [e.get(name) if isinstance(e, dict) else None for e in entries]
        flat = [t for t in found if isinstance(t, TensorRef) and _is_flat(t)]
        if len(flat) < len(self.masters) or any(t.shape < m.shape for t, m in zip(flat, self.masters)):
            return None
        return [TensorRef(t.storage, t.dtype, t.offset, m.shape, (1,)) for t, m in zip(flat, self.masters)]

    def steps(self, count: int) -> list[Any]:
        entries = [e for e in (self.state.get(i) for i in range(count)) if isinstance(e, dict)]
        found = [e.get("step") for e in entries]
        shared = [g.get("step") for g in self.groups]
        last = next((s for s in (*found, *shared) if s is not None), None)
        return [found[i] if i < len(found) and found[i] is not None else last for i in range(count)]

    def settings(self, count: int) -> list[dict[Any, Any]]:
        shown = [{k: v for k, v in g.items() if k != "params"} for g in self.groups] or [{}]
        return [shown[min(i, len(shown) - 1)] for i in range(count)]


def _rank(partition: object) -> Optional[_Rank]:
    held = partition.get("optimizer_state_dict") if isinstance(partition, dict) else None
    if not isinstance(held, dict):
        return None
    masters: list[Any] = next((held[k] for k in _MASTERS if isinstance(held.get(k), list)), [])
    inner = next((held[k] for k in _STATES if held.get(k) is not None), None)
    state, groups = _inner_state(inner)
    flat = [t for t in masters if isinstance(t, TensorRef) and _is_flat(t)]
    return _Rank(flat, state, groups) if flat and len(flat) == len(masters) else None


def _inner_state(inner: object) -> tuple[dict[Any, Any], list[dict[Any, Any]]]:
    """State by number, and groups; saved elastically, it is a list of one entry for each group."""
    if isinstance(inner, list):
        return {i: e for i, e in enumerate(inner) if isinstance(e, dict)}, []
    if not isinstance(inner, dict):
        return {}, []
    state, groups = inner.get("state"), inner.get("param_groups")
    kept = [g for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []
    return (state if isinstance(state, dict) else {}), kept


def _is_flat(tensor: TensorRef) -> bool:
    return len(tensor.shape) == 1 and tensor.stride == (1,) and tensor.storage is not None


def _shapes(value: object) -> Optional[Shapes]:
    found: Shapes = []
    for group in value if isinstance(value, list) else [value]:
        if not isinstance(group, dict):
            return None
        for name, shape in group.items():
            if not isinstance(name, str) or not isinstance(shape, (tuple, list)) or len(shape) > _MAX_DIMENSIONS:
                return None
            if any(type(extent) is not int or extent < 0 for extent in shape):
                return None
        found.append({name: tuple(shape) for name, shape in group.items()})
    names = [name for group in found for name in group]
    return found if names and len(set(names)) == len(names) else None


def _in_rows(shapes: Shapes, vectors: Sequence[Sequence[TensorRef]]) -> Optional[dict[str, TensorRef]]:
    """Stages 1 and 2: `vectors[rank][group]`."""
    if any(len(v) != len(shapes) for v in vectors):
        return None
    made: dict[str, TensorRef] = {}
    for number, group in enumerate(shapes):
        parts = _Vector([v[number] for v in vectors])
        at = 0
        for name, shape in group.items():
            count = math.prod(shape)
            if at + count > parts.length:
                return None
            made[name] = _joined(shape, parts.range(at, count))
            at += count
        # Padded to twice the ranks, and by what the ranks' own alignment adds.
        aligned = 2 * len(vectors)
        if -(-at // aligned) != -(-parts.length // aligned):
            return None
    return made


def _one_range_each(shapes: Shapes, vectors: Sequence[Sequence[TensorRef]]) -> Optional[dict[str, TensorRef]]:
    """Stage 3: `vectors[rank]` are the flat groups, one behind the other."""
    ranks = [_Vector(v) for v in vectors]
    made: dict[str, TensorRef] = {}
    at = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        count = math.prod(shape)
        each = -(-count // len(ranks))
        if any(at + each > r.length for r in ranks):
            return None
        parts = [p for i, r in enumerate(ranks) for p in r.range(at, max(0, min(each, count - i * each)))]
        made[name] = _joined(shape, parts)
        at += each
    return made if all(r.length == at for r in ranks) else None


class _Vector:
    """Flat tensors one behind the other. Ranges are asked for in rising order."""

    def __init__(self, parts: Sequence[TensorRef]) -> None:
        self.length = sum(p.shape[0] for p in parts)
        self._parts = parts
        self._part, self._begins = 0, 0

    def range(self, start: int, count: int) -> list[TensorRef]:
        found = []
        while count:
            part = self._parts[self._part]
            inset = start - self._begins
            if inset >= part.shape[0]:
                self._begins += part.shape[0]
                self._part += 1
                continue
            length = min(count, part.shape[0] - inset)
            found.append(TensorRef(part.storage, part.dtype, part.offset + inset, (length,), (1,)))
            start, count = start + length, count - length
        return found


def _joined(shape: tuple[int, ...], parts: list[TensorRef]) -> TensorRef:
    """A tensor of ranges of its elements in row-major order; their offsets count elements, not rows."""
    stride = contiguous_stride(shape)
    if len(parts) == 1:
        return TensorRef(parts[0].storage, parts[0].dtype, parts[0].offset, shape, stride)
    whole = TensorRef(None, parts[0].dtype if parts else "float32", 0, shape, stride)
    at, pieces = 0, []
    for part in parts:
        pieces.append(((at,), part))
        at += part.shape[0]
    whole.pieces = tuple(pieces)
    return whole
