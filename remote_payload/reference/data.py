"""The demonstration data set: prepared once from real stimuli, read by the adapter.

A folder of `.npy` arrays and `manifest.json`. Each film is cut, in time, into a training, a validation and a test part
with unused frames between them. A sample is a window of ten frames within one part; its target frame is the last.

| array | form | what |
| --- | --- | --- |
| frames | uint8 (F, H, W, 3) | all films' frames, one after another |
| `<split>`_first | int32 (n,) | each window's first row in `frames` |
| `<split>`_codes | int16 (n, 8, K) | codes of the window's sound, -1 throughout where the film has none |
| `<split>`_text | float32 (n, 3, W) | derived embeddings of the window's three parts; there is no transcript |
| `<split>`_bold | float32 (n, V) | simulated BOLD, z-scored within its run |
| voxels | int16 (V, 3) | each voxel's place on the grid |
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remote_payload.reference import bold, brain, film, sound
from remote_payload.reference.sizes import TEXT_SEGMENTS, WINDOW_FRAMES, ReferenceSizes

SPLITS = ("train", "val", "test")
MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
SEED = 20250101
_GAP_FRAMES = 8
_SHARES = {"train": 0.62, "val": 0.12, "test": 0.26}
_SEGMENT_EDGES = (0, 3, 7, WINDOW_FRAMES)

BOLD_LABEL = "simulated BOLD (from features of the real film; no brain was measured)"
TEXT_LABEL = "derived text-like embedding (random projection of colour, luminance and motion; no transcript exists)"
CODES_LABEL = "audio codes of the film's real sound (8-stage residual vector quantiser on log-mel frames)"
VIDEO_LABEL = "real film frames"


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive frames of one film that belong to one split: rows `[start, stop)` of all frames."""

    film: str
    split: str
    start: int
    stop: int

    @property
    def windows(self) -> int:
        return max(0, self.stop - self.start - WINDOW_FRAMES + 1)


@dataclasses.dataclass(frozen=True)
class DemonstrationData:
    """The prepared folder, opened. Arrays of a split are memory-mapped."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> DemonstrationData:
        """Raises `DemonstrationDataError` if the folder holds no data set of this version."""
        try:
            manifest = json.loads((folder / MANIFEST_NAME).read_text())
        except (OSError, ValueError) as error:
            raise film.DemonstrationDataError(f"{folder} holds no demonstration data: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
            raise film.DemonstrationDataError(f"{folder} holds demonstration data of another version: prepare it anew")
        return cls(folder, manifest)

    @property
    def sizes(self) -> ReferenceSizes:
        return ReferenceSizes.at_scale(int(self.manifest["scale"]))

    @property
    def parts(self) -> list[Part]:
        return [Part(**p) for p in self.manifest["parts"]]

    def array(self, name: str) -> NDArray[Any]:
        loaded: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return loaded


def prepare(folder: Path, scale: int) -> dict[str, Any]:
    """Decode, derive, simulate and write; returns the manifest. The same inputs give the same bytes.

    Raises `DemonstrationDataError` when a source package or PyAV is missing.
    """
    sizes = ReferenceSizes.at_scale(scale)
    films = [film.read_film(name, sizes.frame_height, sizes.frame_width) for name in film.FILMS]
    parts = cut_parts([(f.name, len(f.frames)) for f in films])
    starts = np.cumsum([0, *(len(f.frames) for f in films)])
    by_name = {f.name: (f, int(start)) for f, start in zip(films, starts)}
    frames = np.concatenate([f.frames for f in films])
    grid = brain.brain_grid(sizes.voxels)

    arrays: dict[str, NDArray[Any]] = {"frames": frames, "voxels": grid.indices}
    for split, first in _first_frames(parts).items():
        arrays[f"{split}_first"] = first
    arrays.update(_codes(parts, by_name, sizes))
    feature_rows, feature_names = _features(films)
    arrays.update(_text(parts, feature_rows, sizes))
    arrays.update(_bold(parts, feature_rows, feature_names, grid))

    manifest = {
        "schema_version": SCHEMA_VERSION,
        "scale": scale,
        "seed": SEED,
        "sizes": sizes.facts(),
        "parts": [dataclasses.asdict(p) for p in parts],
        "samples": {s: len(arrays[f"{s}_first"]) for s in SPLITS},
        "grid": {"shape": list(grid.shape), "spacing_mm": grid.spacing},
        "modalities": {"video": VIDEO_LABEL, "audio": CODES_LABEL, "text": TEXT_LABEL, "fmri": BOLD_LABEL},
        "bold": {
            "simulated": True,
            "volume_s": bold.VOLUME_S,
            "delay_volumes": bold.DELAY_VOLUMES,
            "response": "double gamma (6, 16, 1/6), each part of each film a run of its own that starts from rest",
            "noise": f"AR(1), coefficient {bold.NOISE_AUTOCORRELATION}, standard deviation {bold.NOISE_DEVIATION}",
            "features": feature_names,
        },
        "sources": [dataclasses.asdict(s) for s in (*(f.source for f in films), *grid.sources)],
    }
    return _write(folder, arrays, manifest)


def cut_parts(films: Sequence[tuple[str, int]]) -> list[Part]:
    """Each film in time order: train, gap, val, gap, test. `films` are (name, frame count)."""
    parts, offset = [], 0
    for name, count in films:
        usable = count - _GAP_FRAMES * (len(SPLITS) - 1)
        position = offset
        for split in SPLITS:
            length = round(usable * _SHARES[split]) if split != SPLITS[-1] else offset + count - position
            parts.append(Part(name, split, position, position + length))
            position += length + _GAP_FRAMES
        offset += count
    return parts


def _first_frames(parts: Sequence[Part]) -> dict[str, NDArray[np.int32]]:
    return {
        split: np.concatenate(
            [np.arange(p.start, p.start + p.windows, dtype=np.int32) for p in parts if p.split == split]
        )
        for split in SPLITS
    }


def _codes(
    parts: Sequence[Part], films: dict[str, tuple[film.Film, int]], sizes: ReferenceSizes
) -> dict[str, NDArray[np.int16]]:
    """Codes per window; the quantiser sees the training parts' sound alone."""
    quantiser = sound.train_quantiser(_training_frames(parts, films), SEED)
    codes: dict[str, list[NDArray[np.int16]]] = {s: [] for s in SPLITS}
    for part in parts:
        movie, offset = films[part.film]
        for first in range(part.start, part.start + part.windows):
            window = np.full((len(quantiser.books), sizes.code_frames), -1, dtype=np.int16)
            if movie.sound is not None:
                length_s = WINDOW_FRAMES / movie.frame_rate_hz
                steps_s = (np.arange(sizes.code_frames) + 0.5) / sizes.code_frames * length_s
                times_s = (first - offset) / movie.frame_rate_hz + steps_s
                window = quantiser.encode(sound.log_mel(movie.sound, movie.sound_rate_hz, times_s))
            codes[part.split].append(window)
    return {f"{s}_codes": np.stack(c) for s, c in codes.items()}


def _training_frames(parts: Sequence[Part], films: dict[str, tuple[film.Film, int]]) -> NDArray[np.float32]:
    step_s = 0.001
    frames = []
    for part in parts:
        movie, offset = films[part.film]
        if part.split == "train" and movie.sound is not None:
            start, stop = ((f - offset) / movie.frame_rate_hz for f in (part.start, part.stop))
            frames.append(
                sound.log_mel(movie.sound, movie.sound_rate_hz, np.arange(start, stop, step_s, dtype=np.float64))
            )
    return np.concatenate(frames)


def _features(films: Sequence[film.Film]) -> tuple[NDArray[np.float64], list[str]]:
    rows: list[NDArray[np.float64]] = []
    names: list[str] = []
    for movie in films:
        mel = None
        if movie.sound is not None:
            times_s = (np.arange(len(movie.frames)) + 0.5) / movie.frame_rate_hz
            mel = sound.log_mel(movie.sound, movie.sound_rate_hz, times_s)
        values, names = bold.stimulus_features(movie.frames, mel)
        rows.append(values)
    return np.concatenate(rows), names


def _standardised(rows: NDArray[np.float64], parts: Sequence[Part]) -> NDArray[np.float64]:
    """z-scored by the training parts' frames."""
    training = np.concatenate([rows[p.start : p.stop] for p in parts if p.split == "train"])
    return np.asarray((rows - training.mean(axis=0)) / np.maximum(training.std(axis=0), 1e-9))


def _text(parts: Sequence[Part], rows: NDArray[np.float64], sizes: ReferenceSizes) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(SEED + 1)
    standard = _standardised(rows, parts)
    projection = generator.standard_normal((rows.shape[1], sizes.text_width)) / np.sqrt(rows.shape[1])
    embeddings = {}
    for split, first in _first_frames(parts).items():
        segments = [
            np.stack([standard[f + a : f + b].mean(axis=0) for f in first])
            for a, b in zip(_SEGMENT_EDGES[:TEXT_SEGMENTS], _SEGMENT_EDGES[1:])
        ]
        projected = np.tanh(np.stack(segments, axis=1) @ projection)
        embeddings[f"{split}_text"] = projected.astype(np.float32)
    return embeddings


def _bold(
    parts: Sequence[Part], rows: NDArray[np.float64], names: list[str], grid: brain.VoxelGrid
) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(SEED + 2)
    weights = bold.voxel_weights(names, grid, generator)
    standard = _standardised(rows, parts)
    shown = standard.copy()
    sound_columns = [i for i, n in enumerate(names) if n.startswith("sound")]
    for part in parts:
        if not rows[part.start : part.stop, sound_columns].any():
            shown[part.start : part.stop, sound_columns] = 0.0
    noiseless = np.concatenate(
        [bold.simulate_run(shown[p.start : p.stop], weights, generator, 0.0) for p in parts if p.split == "train"]
    )
    weights = weights / max(float(np.percentile(noiseless.std(axis=0), 95)), 1e-9)
    volumes: dict[str, list[NDArray[np.float32]]] = {s: [] for s in SPLITS}
    for part in parts:
        run = bold.simulate_run(shown[part.start : part.stop], weights, generator)
        # Within its run, as is usual: else a voxel could score by telling one film from another.
        standard_run = (run - run.mean(axis=0)) / np.maximum(run.std(axis=0), 1e-9)
        last = np.arange(part.windows) + WINDOW_FRAMES - 1 + bold.DELAY_VOLUMES
        volumes[part.split].append(standard_run[last].astype(np.float32))
    return {f"{s}_bold": np.concatenate(v) for s, v in volumes.items()}


def _write(folder: Path, arrays: dict[str, NDArray[Any]], manifest: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, array in sorted(arrays.items()):
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        content = buffer.getvalue()
        files[f"{name}.npy"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        _replace(folder / f"{name}.npy", content)
    listing = "".join(f"{n} {f['sha256']}\n" for n, f in sorted(files.items()))
    complete = {**manifest, "files": files, "digest": hashlib.sha256(listing.encode()).hexdigest()}
    _replace(folder / MANIFEST_NAME, (json.dumps(complete, indent=1, sort_keys=True) + "\n").encode())
    return complete


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
