"""Targets and predictions of all evaluated samples, one row a sample; on disk where they would fill the memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from remote_payload.reconstruct import metrics
from remote_payload.reconstruct.adapters import calling
from remote_payload.reconstruct.measured import Evaluated
from remote_payload.reconstruct.protocol import AdapterError, Kind, Modality, Sample
from remote_payload.reconstruct.ranges import check_shape

_IN_MEMORY_BYTES = 512 * 1024**2


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What the training reference gives: the mean target `(d,)`, and for codes the commonest of each book."""

    means: Mapping[str, NDArray[np.float64]]
    commonest: Mapping[str, NDArray[np.int64]]
    samples: int


class Collected:
    """One modality's rows, filled in the order of the samples. Samples without this modality take no row."""

    def __init__(self, modality: Modality, capacity: int, scratch: Path) -> None:
        self.modality = modality
        self.count = 0
        self.positions: list[int] = []
        width = int(np.prod(modality.shape))
        self._targets = _allocate(capacity, width, scratch)
        self._predictions = _allocate(capacity, width, scratch)
        self._latents: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    @property
    def targets(self) -> NDArray[np.float32]:
        return self._targets[: self.count]

    @property
    def predictions(self) -> NDArray[np.float32]:
        return self._predictions[: self.count]

    def add(self, positions: Sequence[int], samples: Sequence[Sample], predicted: Any) -> range:
        """Append the samples of a batch that have this modality; gives the rows that they took.

        Raises `AdapterError` if a shape is not the declared one.
        """
        given = as_array(predicted)
        check_shape("prediction", self.modality, given, len(samples))
        start = self.count
        for offset, (position, sample) in enumerate(zip(positions, samples)):
            if self.modality.name not in sample.targets:
                continue
            target = as_array(sample.targets[self.modality.name])
            check_shape("target", self.modality, target)
            self._targets[self.count] = target.reshape(-1)
            self._predictions[self.count] = given[offset].reshape(-1)
            self.positions.append(position)
            self.count += 1
        return range(start, self.count)

    def add_latents(self, samples: Sequence[Sample], latents: Mapping[str, Any]) -> None:
        """Append a batch's latents of targets and predictions, kept in host memory, for the samples with this modality.

        Raises `AdapterError` unless there are two alike, a row a sample.
        """
        pair = latents.get(self.modality.name)
        if pair is None:
            return
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise AdapterError(f"latents of {self.modality.name!r} are no pair of targets' and predictions'")
        wanted, given = as_array(pair[0]), as_array(pair[1])
        if wanted.shape != given.shape or wanted.ndim < 2 or len(wanted) != len(samples):
            raise AdapterError(
                f"latents of {self.modality.name!r} have shapes {wanted.shape} and {given.shape} "
                f"for {len(samples)} samples"
            )
        kept = [n for n, sample in enumerate(samples) if self.modality.name in sample.targets]
        if kept:
            width = int(np.prod(wanted.shape[1:]))
            rows = [np.asarray(a[kept], dtype=np.float32).reshape(len(kept), width) for a in (wanted, given)]
            self._latents.append((rows[0], rows[1]))

    def latents(self) -> Optional[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Latents of all rows' targets and predictions, or None. `AdapterError` if some batches had none."""
        if not self._latents:
            return None
        wanted, given = (np.concatenate([pair[side] for pair in self._latents]) for side in (0, 1))
        if len(wanted) != self.count:
            raise AdapterError(f"latents of {self.modality.name!r} are given for {len(wanted)} of {self.count} samples")
        return wanted, given

    def evaluated(
        self, baselines: Optional[Baselines], ordered: bool, dependence: int, seed: int, rows: Optional[range] = None
    ) -> Evaluated:
        """These rows (all by default) for the metrics."""
        name = self.modality.name
        kept = slice(None) if rows is None else slice(rows.start, rows.stop)
        return Evaluated(
            self.modality,
            self.targets[kept],
            self.predictions[kept],
            baselines.means.get(name) if baselines else None,
            baselines.commonest.get(name) if baselines else None,
            ordered,
            dependence,
            seed,
            latents=self.latents() if rows is None else None,
        )

    def original(self, row: int) -> NDArray[np.float32]:
        return np.asarray(self._targets[row].reshape(self.modality.shape))

    def reconstruction(self, row: int) -> NDArray[np.float32]:
        return np.asarray(self._predictions[row].reshape(self.modality.shape))


def as_array(value: Any) -> NDArray[Any]:
    """A tensor or array on the host; 16-bit floats as float32, which NumPy has no other name for."""
    if isinstance(value, torch.Tensor):
        detached = value.detach()
        if detached.dtype in (torch.bfloat16, torch.float16):
            detached = detached.float()
        host: NDArray[Any] = detached.cpu().numpy()
        return host
    return np.asarray(value)


def baselines_of(
    samples: Sequence[Sample], modalities: Sequence[Modality], told: Optional[Callable[[int], None]] = None
) -> Baselines:
    """Mean targets, and the commonest codes, over the training reference. Raises `AdapterError` for a wrong shape."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    codes: dict[str, list[NDArray[Any]]] = {}
    for position in range(len(samples)):
        with calling("train_reference"):
            sample = samples[position]
        for modality in modalities:
            if modality.name not in sample.targets:
                continue
            target = as_array(sample.targets[modality.name])
            check_shape("training target", modality, target)
            flat = target.reshape(-1).astype(np.float64)
            sums[modality.name] = sums[modality.name] + flat if modality.name in sums else flat
            counts[modality.name] = counts.get(modality.name, 0) + 1
            if modality.kind is Kind.CODES:
                codes.setdefault(modality.name, []).append(np.rint(target).astype(np.int32))
        if told is not None:
            told(position + 1)
    by_name = {m.name: m for m in modalities}
    commonest = {name: metrics.commonest_codes(by_name[name], seen) for name, seen in codes.items()}
    return Baselines({name: total / counts[name] for name, total in sums.items()}, commonest, len(samples))


def check_predictions(predicted: Any, modalities: Sequence[Modality]) -> None:
    """Raise `AdapterError` unless there is a prediction for each declared modality."""
    if not isinstance(predicted, Mapping):
        raise AdapterError(
            f"the adapter's predict gave a {type(predicted).__name__}, not a mapping of modality to tensor"
        )
    missing = [m.name for m in modalities if m.name not in predicted]
    if missing:
        raise AdapterError(f"the adapter's predict gave {sorted(predicted)}; declared and not given: {missing}")


def _allocate(rows: int, width: int, scratch: Path) -> NDArray[np.float32]:
    if rows * width * 4 <= _IN_MEMORY_BYTES:
        return np.zeros((rows, width), dtype=np.float32)
    # Unlinked at once: the space is given back however this process ends.
    with tempfile.NamedTemporaryFile(dir=scratch, prefix=".rows-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, width))
