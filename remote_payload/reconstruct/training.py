"""Reads the training reference once: what the baselines are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.adapters import calling
from remote_payload.reconstruct.collect import allocate
from remote_payload.reconstruct.metrics import commonest_codes
from remote_payload.reconstruct.prediction import as_array
from remote_payload.reconstruct.products import mean_squared_errors
from remote_payload.reconstruct.protocol import Kind, Modality, Sample
from remote_payload.reconstruct.ranges import check_shape
from remote_payload.reconstruct.stimuli import StimulusError, StimulusSpace, contains

MOST_KEPT = 2048
"""Training samples that are kept, evenly spaced, for ridge regression and the check for copies."""
_CHUNK_BYTES = 64 * 1024**2
_LOOKED_AT = 3

Told = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Shown:
    """The evaluated samples' inputs: features `(n, f)`, centred, each input of equal weight; row i is sample
    `positions[i]`.

    `features` is None where there are none, and `reason` says why. `holds` are the modalities whose targets lie among
    the inputs.
    """

    positions: Mapping[int, int]
    features: Optional[NDArray[np.float32]]
    space: Optional[StimulusSpace]
    mean: Any
    scale: Any
    reason: str
    holds: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What the training reference gives.

    `means` `(d,)` by modality, and for codes the commonest of each book. Of `kept` training samples (their positions)
    `targets` `(k, d)` and `inputs` `(k, f)` are held, `has` `(k,)` says which have the modality. `nearest` `(n,)` is by
    modality the position of the training sample whose input is nearest to that of each evaluated one, -1 without one,
    of all training samples; `distance` `(n,)` the mean squared difference of the inputs.
    """

    means: Mapping[str, NDArray[np.float64]]
    commonest: Mapping[str, NDArray[np.int64]]
    samples: int
    kept: NDArray[np.int64]
    targets: Mapping[str, NDArray[np.float32]]
    has: Mapping[str, NDArray[np.bool_]]
    inputs: Optional[NDArray[np.float32]]
    nearest: Mapping[str, NDArray[np.int64]]
    distance: Mapping[str, NDArray[np.float64]]
    reason: str
    """Why there are no inputs and no nearest samples."""


def look_at_inputs(
    samples: Sequence[Sample], positions: Sequence[int], seed: int, scratch: Path, told: Optional[Told] = None
) -> Shown:
    """The inputs of the samples at `positions` as features."""
    places = {position: row for row, position in enumerate(positions)}
    space: Optional[StimulusSpace] = None
    features: Optional[NDArray[np.float32]] = None
    missing: set[str] = set()
    found: set[str] = set()
    try:
        for row, position in enumerate(positions):
            with calling("samples"):
                sample = samples[position]
            if space is None or features is None:
                space = StimulusSpace(sample.inputs, seed)
                features = allocate(len(positions), space.width, scratch)
            features[row] = space.row(sample.inputs)
            if row < _LOOKED_AT:
                for name, target in sample.targets.items():
                    (found if contains(sample.inputs, as_array(target)) else missing).add(name)
            if told is not None:
                told(row + 1)
    except StimulusError as error:
        return Shown(places, None, None, None, None, str(error), frozenset())
    if space is None or features is None:
        return Shown(places, None, None, None, None, "there are no samples", frozenset())
    mean, scale = space.standardise(features)
    _standardise(features, mean, scale)
    return Shown(places, features, space, mean, scale, "", frozenset(found - missing))


def baselines_of(
    samples: Sequence[Sample],
    modalities: Sequence[Modality],
    shown: Shown,
    scratch: Path,
    told: Optional[Told] = None,
) -> Baselines:
    """One pass over the training reference. Raises `AdapterError` for a wrong shape."""
    reading = _Reading(len(samples), modalities, shown, scratch)
    for position in range(len(samples)):
        with calling("train_reference"):
            sample = samples[position]
        reading.add(position, sample)
        if told is not None:
            told(position + 1)
    return reading.finished()


class _Reading:
    def __init__(self, count: int, modalities: Sequence[Modality], shown: Shown, scratch: Path) -> None:
        self._modalities = modalities
        self._shown = shown
        self._count = count
        self._reason = shown.reason
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}
        self._codes: dict[str, list[NDArray[Any]]] = {}
        self._kept = np.unique(np.linspace(0, count - 1, min(count, MOST_KEPT)).round().astype(np.int64))
        self._rows = {int(position): row for row, position in enumerate(self._kept)}
        self._targets = {m.name: allocate(len(self._kept), int(np.prod(m.shape)), scratch) for m in modalities}
        self._has = {m.name: np.zeros(len(self._kept), dtype=bool) for m in modalities}
        evaluated = len(shown.positions)
        self._nearest = {m.name: np.full(evaluated, -1, dtype=np.int64) for m in modalities}
        self._distance = {m.name: np.full(evaluated, np.inf) for m in modalities}
        self._inputs: Optional[NDArray[np.float32]] = None
        self._chunk: list[tuple[int, NDArray[np.float32], frozenset[str]]] = []
        self._chunk_rows = 1
        if shown.space is not None:
            self._inputs = allocate(len(self._kept), shown.space.width, scratch)
            self._chunk_rows = max(1, min(512, _CHUNK_BYTES // (4 * shown.space.width)))

    def add(self, position: int, sample: Sample) -> None:
        row = self._rows.get(position)
        for modality in self._modalities:
            if modality.name not in sample.targets:
                continue
            name = modality.name
            target = as_array(sample.targets[name])
            check_shape("training target", modality, target)
            flat = target.reshape(-1).astype(np.float64)
            self._sums[name] = self._sums[name] + flat if name in self._sums else flat
            self._counts[name] = self._counts.get(name, 0) + 1
            if modality.kind is Kind.CODES:
                self._codes.setdefault(name, []).append(np.rint(target).astype(np.int32))
            if row is not None:
                self._targets[name][row] = flat
                self._has[name][row] = True
        self._look_at(position, row, sample)

    def _look_at(self, position: int, row: Optional[int], sample: Sample) -> None:
        space = self._shown.space
        if space is None or self._inputs is None:
            return
        try:
            features = space.row(sample.inputs)[None]
        except StimulusError as error:
            self._reason, self._inputs, self._chunk = f"{error}, in the training reference", None, []
            return
        _standardise(features, self._shown.mean, self._shown.scale)
        if row is not None:
            self._inputs[row] = features[0]
        self._chunk.append((position, features[0], frozenset(sample.targets)))
        if len(self._chunk) >= self._chunk_rows:
            self._compare()

    def _compare(self) -> None:
        """Training samples seen since the last time against the nearest of every evaluated one."""
        if not self._chunk or self._shown.features is None:
            return
        positions = np.array([position for position, _, _ in self._chunk])
        apart = mean_squared_errors(self._shown.features, np.stack([features for _, features, _ in self._chunk]))
        for name, nearest in self._nearest.items():
            usable = np.array([name in names for _, _, names in self._chunk])
            if usable.any():
                mine = apart[:, usable]
                best = mine.argmin(axis=1)
                distance = mine[np.arange(len(mine)), best]
                closer = distance < self._distance[name]
                nearest[closer] = positions[usable][best[closer]]
                self._distance[name][closer] = distance[closer]
        self._chunk = []

    def finished(self) -> Baselines:
        self._compare()
        by_name = {m.name: m for m in self._modalities}
        is_known = self._inputs is not None
        return Baselines(
            {name: total / self._counts[name] for name, total in self._sums.items()},
            {name: commonest_codes(by_name[name], seen) for name, seen in self._codes.items()},
            self._count,
            self._kept,
            self._targets,
            self._has,
            self._inputs,
            self._nearest if is_known else {},
            self._distance if is_known else {},
            self._reason,
        )


def _standardise(rows: NDArray[np.float32], mean: Any, scale: Any) -> None:
    """In place, a row at a time: a memory map of many rows never becomes memory."""
    for row in rows:
        row[:] = (row - mean) / scale
