"""Which samples are shown, and the pictures and sounds of them as artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import images, panels, sound_panels, voxel_panels
from remote_payload.reconstruct.collect import Collected
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.measured import Evaluated
from remote_payload.reconstruct.protocol import Kind, Modality, Sample
from remote_payload.reconstruct.statistics import RowsLike
from remote_payload.reconstruct.voxel_metrics import shifted_voxelwise_correlations, voxelwise_correlations

Write = Callable[[str, bytes], object]

_STRIDES = (4, 3, 2, 1)
_TRIES, _SMALLEST = 6, 0.15
_PICTURES_BYTES, _SOUNDS_BYTES = 4_250_000, 1_750_000
"""Of all samples together: in base64 they leave room in a report of 10 MB."""
_WAV_HEADER_BYTES = 44


@dataclasses.dataclass(frozen=True)
class Shown:
    """One sample to show, by its position in the split, and why it was chosen: best, median, worst or evenly spaced."""

    position: int
    why: str


def choose_shown(errors: Mapping[int, float], wanted: int) -> list[Shown]:
    """`wanted` samples: median, best and worst by error, then evenly spaced ones; in the split's order."""
    positions = sorted(errors)
    ranked = sorted(positions, key=lambda p: (errors[p], p))
    if not ranked or wanted < 1:
        return []
    candidates = [Shown(ranked[(len(ranked) - 1) // 2], "median"), Shown(ranked[0], "best"), Shown(ranked[-1], "worst")]
    spread = np.linspace(0, len(positions) - 1, min(len(positions), max(2, 2 * wanted))).round().astype(int)
    middle_first = sorted(spread, key=lambda i: abs(int(i) - len(positions) // 2))
    candidates += [Shown(positions[int(i)], "evenly spaced") for i in middle_first]
    candidates += [Shown(p, "evenly spaced") for p in positions]
    chosen: dict[int, Shown] = {}
    for candidate in candidates:
        if len(chosen) < wanted:
            chosen.setdefault(candidate.position, candidate)
    return [chosen[p] for p in sorted(chosen)]


@dataclasses.dataclass(frozen=True)
class Share:
    """What one sample's picture, and all sounds of it, may take of a report."""

    picture_bytes: int = _PICTURES_BYTES
    sound_bytes: int = _SOUNDS_BYTES


def share_of(modalities: Sequence[Modality], samples: int) -> Share:
    """An equal part for each sample of each modality that takes many bytes."""
    kinds = [m.kind for m in modalities]
    large = sum(kind in (Kind.IMAGE, Kind.VIDEO, Kind.AUDIO_WAVEFORM, Kind.MEL) for kind in kinds)
    audible = kinds.count(Kind.AUDIO_WAVEFORM)
    return Share(_PICTURES_BYTES // max(1, large * samples), _SOUNDS_BYTES // max(1, audible * samples))


def draw_sample(
    collected: Collected,
    samples: Sequence[Sample],
    shown: Shown,
    number: int,
    job: str,
    write: Write,
    nearest: Optional[RowsLike] = None,
    share: Share = Share(),
) -> list[dict[str, Any]]:
    """The pictures (and sounds) of one modality of one sample; none if the sample lacks it or it has no picture.

    `nearest` are the nearest training samples, a row beside each of `collected`. What would take more than its share
    is drawn smaller, and sounds are cut to their beginning.
    """
    if shown.position not in collected.positions:
        return []
    row = collected.positions.index(shown.position)
    modality = collected.modality
    picture = _picture(_Sight(collected, samples, nearest), row, share.picture_bytes)
    if picture is None:
        return []
    sample = samples[shown.position]
    entry = _Entry(job, modality, sample.id, f"sample-{number:02d}-{file_name(modality.name)}", write)
    roles = "original, reconstruction, difference" + ("" if nearest is None else ", nearest training sample")
    entries = [
        entry.picture("", picture, f"{sample.id}: {roles}", f"{shown.why} of the evaluated samples", "comparison")
    ]
    if modality.kind is Kind.AUDIO_WAVEFORM and modality.sample_rate_hz:
        entries += entry.sounds(collected.original(row), collected.reconstruction(row), shown.why, share.sound_bytes)
    return entries


def draw_voxels(evaluated: Evaluated, job: str, write: Write) -> list[dict[str, Any]]:
    """The histogram of voxelwise correlations, and slices of the map where places are given."""
    modality = evaluated.modality
    observed = voxelwise_correlations(evaluated)
    if not np.isfinite(observed).any():
        return []
    entry = _Entry(job, modality, "", file_name(modality.name), write)
    null = shifted_voxelwise_correlations(evaluated)
    drawn = [
        entry.picture(
            "-histogram",
            images.png_bytes(voxel_panels.histogram(observed, null)),
            "Voxelwise correlation over time",
            "blue: the model; grey: the same predictions paired with the wrong times",
            "histogram",
        )
    ]
    if modality.places is not None:
        extent = max(0.1, float(np.nanpercentile(np.abs(observed), 98)))
        drawn.append(
            entry.picture(
                "-map",
                images.png_bytes(voxel_panels.slices(observed, modality.places, extent)),
                "Map of voxelwise correlation over time",
                "axial slices from bottom to top, front up",
                "map",
            )
        )
    return drawn


def file_name(name: str) -> str:
    """A modality's name as part of an artifact's name."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)[:40]
    return plain.strip("-") or "modality"


@dataclasses.dataclass(frozen=True)
class _Entry:
    job: str
    modality: Modality
    sample: str
    stem: str
    write: Write

    def picture(self, suffix: str, png: bytes, title: str, caption: str, role: str) -> dict[str, Any]:
        return self._written(f"pictures/{self.stem}{suffix}.png", png, "image", title, caption, role)

    def sounds(self, original: NDArray[Any], given: NDArray[Any], why: str, limit_bytes: int) -> list[dict[str, Any]]:
        rate = self.modality.sample_rate_hz or 0
        peak = max(float(np.abs(original).max()), 1e-9)
        signals = [panels.as_signal(self.modality, a) for a in (original, given)]
        length, channels = signals[0].shape
        kept = max(1, (limit_bytes // 2 - _WAV_HEADER_BYTES) // (2 * channels))
        if kept < length:
            why = f"{why}; the first {kept / rate:.1f} s of {length / rate:.1f} s"
        return [
            self._written(
                f"sounds/{self.stem}-{role}.wav",
                images.wav_bytes(signal[:kept], rate, peak),
                "audio",
                f"{self.sample}: {role}",
                why,
                role,
            )
            for role, signal in zip(("original", "reconstruction"), signals)
        ]

    def _written(self, name: str, data: bytes, kind: str, title: str, caption: str, role: str) -> dict[str, Any]:
        self.write(name, data)
        label = f"{self.modality.label}; " if self.modality.label else ""
        return {
            "path": f"{self.job}/{name}",
            "kind": kind,
            "title": f"{self.modality.name} {title}" if self.sample else title,
            "caption": f"{label}{caption}",
            "sample": self.sample or None,
            "modality": self.modality.name,
            "role": role,
        }


@dataclasses.dataclass(frozen=True)
class _Sight:
    collected: Collected
    samples: Sequence[Sample]
    nearest: Optional[RowsLike]

    def arrays(self, row: int) -> list[NDArray[Any]]:
        """Original, reconstruction and, where there is one, the nearest training sample."""
        arrays = [self.collected.original(row), self.collected.reconstruction(row)]
        if self.nearest is not None:
            arrays.append(np.asarray(self.nearest[row]).reshape(self.collected.modality.shape))
        return arrays


def _picture(sight: _Sight, row: int, limit_bytes: int) -> Optional[bytes]:
    modality = sight.collected.modality
    if modality.kind in (Kind.IMAGE, Kind.VIDEO):
        rows = _neighbours(sight.collected, sight.samples, row)
        frames, marked = _frames(sight, rows), rows.index(row) if len(rows) > 1 else None
        return _within(lambda scale: panels.film_strip(modality, frames, marked, scale), limit_bytes)
    if modality.kind is Kind.AUDIO_WAVEFORM:
        drawn = sound_panels.waveforms(modality, sight.arrays(row))
    elif modality.kind in (Kind.CODES, Kind.MEL, Kind.TEXT_EMBEDDING):
        drawn = panels.matrices(modality, sight.arrays(row))
    else:
        return None
    return images.png_bytes(drawn)


def _within(draw: Callable[[float], Picture], limit_bytes: int) -> bytes:
    """As large as fits, or the smallest that is still drawn. Bytes grow about as the area does."""
    scale, png = 1.0, b""
    for _ in range(_TRIES):
        png = images.png_bytes(draw(scale))
        if len(png) <= limit_bytes or scale <= _SMALLEST:
            break
        scale = max(_SMALLEST, 0.93 * scale * (limit_bytes / len(png)) ** 0.5)
    return png


def _frames(sight: _Sight, rows: Sequence[int]) -> list[tuple[str, list[NDArray[Any]]]]:
    """(caption, arrays) of at most `MAX_FRAMES` frames of each row."""
    collected = sight.collected
    frames = []
    for r in rows:
        films = [panels.as_frames(collected.modality, a) for a in sight.arrays(r)]
        count = len(films[0])
        kept = np.unique(np.linspace(0, count - 1, min(count, panels.MAX_FRAMES)).round().astype(int))
        name = sight.samples[collected.positions[r]].id
        frames += [(f"{name} {i}" if count > 1 else name, [film[i] for film in films]) for i in kept]
    return frames


def _neighbours(collected: Collected, samples: Sequence[Sample], row: int) -> list[int]:
    """The row itself; of a video of one frame a sample, its neighbours in time with it."""
    modality, group = collected.modality, samples[collected.positions[row]].group
    if not group or modality.kind is not Kind.VIDEO or "T" in modality.layout:
        return [row]
    reach = _STRIDES[0] * panels.MAX_FRAMES
    first = last = row
    while first > max(0, row - reach) and samples[collected.positions[first - 1]].group == group:
        first -= 1
    while last < min(collected.count - 1, row + reach) and samples[collected.positions[last + 1]].group == group:
        last += 1
    return neighbour_rows(row, first, last)


def neighbour_rows(row: int, first: int, last: int) -> list[int]:
    """`MAX_FRAMES` rows of [first, last] at the widest even spacing that fits, `row` among them and near the middle."""
    count = panels.MAX_FRAMES
    for stride in _STRIDES:
        starts = [row - k * stride for k in range(count)]
        fitting = [s for s in starts if s >= first and s + (count - 1) * stride <= last]
        if fitting:
            start = min(fitting, key=lambda s: abs(s + (count // 2) * stride - row))
            return list(range(start, start + count * stride, stride))
    return list(range(first, last + 1))
