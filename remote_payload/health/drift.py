"""What moved between an earlier checkpoint and this one, tensor by tensor. Needs torch."""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, Role, TensorEntry
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.health.facts import DriftFacts, TensorDrift
from remote_payload.health.run_config import as_number

_STEP = 1 << 20
"""Elements at once: their float64 copies stay small whatever the tensor's size."""
_NOT_COMPARED = frozenset({Role.COUNTER})


def measure_drift(
    header: CheckpointHeader, earlier: CheckpointHeader, progress: Callable[[int, int], None]
) -> DriftFacts:
    """Compare the model's floating-point tensors of equal name and shape. `progress(tensors_done, tensors_total)`.

    Tensors that only one file has, that changed their shape or that cannot be read are listed, not raised.
    """
    before = {t.name: t for t in earlier.model_tensors()}
    compared: dict[str, TensorDrift] = {}
    not_compared: dict[str, str] = {}
    entries = [t for t in header.model_tensors() if is_floating(t.dtype) and t.role not in _NOT_COMPARED]
    for done, tensor in enumerate(entries, start=1):
        other = before.get(tensor.name)
        reason = _why_not(tensor, other)
        if reason:
            not_compared[tensor.name] = reason
        else:
            try:
                compared[tensor.name] = _compare(header, earlier, tensor)
            except CheckpointError as error:
                not_compared[tensor.name] = str(error)
        progress(done, len(entries))
    return DriftFacts(
        earlier=earlier.path,
        tensors=compared,
        not_compared=not_compared,
        steps=_largest_count(header),
        earlier_steps=_largest_count(earlier),
    )


def _why_not(tensor: TensorEntry, other: object) -> str:
    if not isinstance(other, TensorEntry):
        return "the earlier checkpoint does not have it"
    if other.shape != tensor.shape:
        return f"its shape was {list(other.shape)[:16]}"
    if tensor.file_offset is None or other.file_offset is None:
        return "its bytes are not in the file"
    if min(tensor.span_bytes, other.span_bytes) < (tensor.nbytes or 0) // 2:
        # A view with a stride of 0 can claim any size.
        return "a view that repeats its bytes"
    return "it has no elements" if tensor.numel == 0 else ""


def _compare(header: CheckpointHeader, earlier: CheckpointHeader, tensor: TensorEntry) -> TensorDrift:
    now = load_tensor(header, tensor.name, copy=False).reshape(-1)
    was = load_tensor(earlier, tensor.name, copy=False).reshape(-1)
    identical, squares_now, squares_was, products, squares_of_change = 0, 0.0, 0.0, 0.0, 0.0
    for new_part, old_part in zip(torch.split(now, _STEP), torch.split(was, _STEP)):
        new, old = new_part.to(torch.float64), old_part.to(torch.float64)
        # Two NaN in the same place are no change either.
        identical += int(((new == old) | (new.isnan() & old.isnan())).sum())
        squares_now += float(torch.dot(new, new))
        squares_was += float(torch.dot(old, old))
        products += float(torch.dot(new, old))
        change = new - old
        squares_of_change += float(torch.dot(change, change))
    count = now.numel()
    return TensorDrift(
        count=count,
        identical_fraction=identical / count,
        relative_change=_ratio(math.sqrt(squares_of_change), math.sqrt(squares_was))
        if math.isfinite(squares_of_change)
        else None,
        cosine=_ratio(products, math.sqrt(squares_now) * math.sqrt(squares_was)),
    )


def _ratio(above: float, below: float) -> Optional[float]:
    value = above / below if below > 0 else math.nan
    return value if math.isfinite(value) else None


def _largest_count(header: CheckpointHeader) -> Optional[int]:
    counts = [t.value for t in header.model_tensors() if t.role is Role.COUNTER and isinstance(t.value, int)]
    counts.extend(int(s) for s in map(as_number, header.optimizer.steps if header.optimizer else ()) if s is not None)
    counts.extend(v for k, v in header.scalars.items() if k in ("global_step", "step") and type(v) is int)
    return max(counts, default=None)
