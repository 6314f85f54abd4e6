"""Targets and predictions of all evaluated samples, one row a sample; on disk where they would fill the memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.measured import Evaluated
from remote_payload.reconstruct.prediction import as_array
from remote_payload.reconstruct.protocol import AdapterError, Modality, Sample
from remote_payload.reconstruct.ranges import check_shape

if TYPE_CHECKING:
    from remote_payload.reconstruct.training import Baselines

_IN_MEMORY_BYTES = 128 * 1024**2


class Collected:
    """One modality's rows, filled in the order of the samples. Samples without this modality take no row."""

    def __init__(self, modality: Modality, capacity: int, scratch: Path) -> None:
        self.modality = modality
        self.count = 0
        self.positions: list[int] = []
        self._names: list[tuple[str, str, str]] = []
        width = int(np.prod(modality.shape))
        self._targets = allocate(capacity, width, scratch)
        self._predictions = allocate(capacity, width, scratch)
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
            self._names.append((str(sample.group), str(sample.stimulus), str(sample.subject)))
            self.count += 1
        return range(start, self.count)

    def add_latents(self, samples: Sequence[Sample], latents: Mapping[str, Any]) -> None:
        """Append a batch's latents of targets and predictions, kept in host memory, for the samples with this modality.

        Raises `AdapterError` unless there are two alike, a row a sample.
        """
        pair = latents.get(self.modality.name)
        if pair is None:
            return
        wanted, given = latents_pair(self.modality.name, pair, len(samples))
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
        """These rows (all by default) for the metrics, with the train mean and no other baseline."""
        name = self.modality.name
        kept = slice(0, self.count) if rows is None else slice(rows.start, rows.stop)
        groups, stimuli, subjects = ([names[column] for names in self._names[kept]] for column in range(3))
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
            groups=tuple(groups) if any(groups) else (),
            stimuli=tuple(stimuli) if any(stimuli) else (),
            subjects=tuple(subjects) if any(subjects) else (),
        )

    def original(self, row: int) -> NDArray[np.float32]:
        return np.asarray(self._targets[row].reshape(self.modality.shape))

    def reconstruction(self, row: int) -> NDArray[np.float32]:
        return np.asarray(self._predictions[row].reshape(self.modality.shape))


def latents_pair(name: str, pair: Any, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents of targets and predictions. Raises `AdapterError` unless there are two alike, a row a sample."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise AdapterError(f"latents of {name!r} are no pair of targets' and predictions'")
    wanted, given = as_array(pair[0]), as_array(pair[1])
    if wanted.shape != given.shape or wanted.ndim < 2 or len(wanted) != count:
        raise AdapterError(f"latents of {name!r} have shapes {wanted.shape} and {given.shape} for {count} samples")
    return wanted, given


def check_predictions(predicted: Any, modalities: Sequence[Modality]) -> None:
    """Raise `AdapterError` unless there is a prediction for each declared modality."""
    if not isinstance(predicted, Mapping):
        raise AdapterError(
            f"the adapter's predict gave a {type(predicted).__name__}, not a mapping of modality to tensor"
        )
    missing = [m.name for m in modalities if m.name not in predicted]
    if missing:
        raise AdapterError(f"the adapter's predict gave {sorted(predicted)}; declared and not given: {missing}")


def allocate(rows: int, width: int, scratch: Path) -> NDArray[np.float32]:
    """Rows of zeros: in memory, or where they would fill it in a file of the folder `scratch` that has no name."""
    if rows * width * 4 <= _IN_MEMORY_BYTES:
        return np.zeros((rows, width), dtype=np.float32)
    # Unlinked at once: the space is given back however this process ends.
    with tempfile.NamedTemporaryFile(dir=scratch, prefix=".rows-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, width))
