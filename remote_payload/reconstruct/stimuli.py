"""What the model is shown, as rows of numbers: for the baselines that compare samples by their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from remote_payload.reconstruct.statistics import Floats, mean_over_rows, variance_over_rows

WIDEST = 16384
"""Wider inputs are hashed to as many features: inner products then have a standard error of about 1 % of the norms'."""


class StimulusError(Exception):
    """The inputs cannot be laid side by side; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """One input: its width, the features `columns` that it takes, and how its values are hashed, if they are."""

    width: int
    columns: slice
    hashing: Optional[tuple[NDArray[np.int64], NDArray[np.float32]]] = None
    """The feature and the sign of each value."""


class StimulusSpace:
    """Flattens each input of a sample and lays them side by side; the first sample says which inputs there are.

    An input wider than `widest` goes through a count sketch (Charikar, Chen & Farach-Colton 2002): each value is added,
    with a random sign, to one of `widest` features. That keeps inner products and distances but for noise.
    """

    def __init__(self, inputs: Mapping[str, Any], seed: int, widest: int = WIDEST) -> None:
        """Raises `StimulusError` where an input is no array of numbers."""
        self._blocks: dict[str, _Block] = {}
        start = 0
        generator = np.random.default_rng(seed)
        for name in sorted(_mapping(inputs)):
            width = _flat(name, inputs[name]).size
            if width > widest:
                bucket = generator.integers(0, widest, width)
                sign = generator.choice(np.array([-1.0, 1.0], dtype=np.float32), width)
                self._blocks[name] = _Block(width, slice(start, start + widest), (bucket, sign))
            else:
                self._blocks[name] = _Block(width, slice(start, start + width))
            start = self._blocks[name].columns.stop
        self.width = start
        if not start:
            raise StimulusError("a sample has no inputs")

    @property
    def facts(self) -> dict[str, Any]:
        hashed = {n: b.width for n, b in self._blocks.items() if b.hashing is not None}
        return {"inputs": sorted(self._blocks), "features": self.width, **({"hashed": hashed} if hashed else {})}

    def row(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        """`(width,)`. Raises `StimulusError` for other inputs, or other shapes, than the first sample's."""
        if set(_mapping(inputs)) != set(self._blocks):
            raise StimulusError("samples have different inputs")
        found = np.empty(self.width, dtype=np.float32)
        for name, block in self._blocks.items():
            values = _flat(name, inputs[name])
            if values.size != block.width:
                raise StimulusError(f"the input {name!r} differs in shape between samples")
            if not np.isfinite(values).all():
                raise StimulusError(f"the input {name!r} holds NaN or infinity")
            if block.hashing is None:
                found[block.columns] = values
            else:
                bucket, sign = block.hashing
                found[block.columns] = np.bincount(bucket, values * sign, block.columns.stop - block.columns.start)
        return found

    def standardise(self, rows: NDArray[np.float32]) -> tuple[Floats, Floats]:
        """`(width,)` twice: the mean of `rows`, and what features are divided by so that each input weighs the same.

        The divisor is one for all features of an input: relations within an input stay.
        """
        mean = mean_over_rows(rows)
        scale = np.ones(self.width)
        for block in self._blocks.values():
            part = rows[:, block.columns]
            spread = np.sqrt(variance_over_rows(part) * part.shape[1])
            scale[block.columns] = spread if spread > 0 else 1.0
        return mean, scale


def contains(inputs: Mapping[str, Any], target: Any) -> bool:
    """Whether the target lies among the inputs as it is, or as one of the equal pieces of an input."""
    wanted = np.asarray(target, dtype=np.float32).reshape(-1)
    for name in inputs if isinstance(inputs, Mapping) else ():
        try:
            values = _flat(name, inputs[name])
        except StimulusError:
            continue
        if values.size and values.size % wanted.size == 0:
            pieces = values.reshape(-1, wanted.size)
            if bool((pieces == wanted).all(axis=1).any()):
                return True
    return False


def _mapping(inputs: Any) -> Mapping[str, Any]:
    """An adapter with a collate of its own may hand over anything."""
    if not isinstance(inputs, Mapping):
        raise StimulusError(f"a sample's inputs are a {type(inputs).__name__} and no mapping")
    return inputs


def _flat(name: str, value: Any) -> NDArray[np.float32]:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    try:
        return np.asarray(value).astype(np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise StimulusError(f"the input {name!r} is no array of numbers") from None
