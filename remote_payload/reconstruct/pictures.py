"""Which samples are shown, and the pictures and sounds of them as artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import images, panels, voxel_panels
from remote_payload.reconstruct.collect import Collected
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.measured import Evaluated
from remote_payload.reconstruct.protocol import Kind, Modality, Sample
from remote_payload.reconstruct.voxel_metrics import shifted_voxelwise_correlations, voxelwise_correlations

Write = Callable[[str, bytes], object]

_STRIDES = (4, 3, 2, 1)


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


def draw_sample(
    collected: Collected, samples: Sequence[Sample], shown: Shown, number: int, job: str, write: Write
) -> list[dict[str, Any]]:
    """The pictures (and sounds) of one modality of one sample; none if the sample lacks it or it has no picture."""
    if shown.position not in collected.positions:
        return []
    row = collected.positions.index(shown.position)
    modality = collected.modality
    picture = _picture(collected, samples, row)
    if picture is None:
        return []
    sample = samples[shown.position]
    entry = _Entry(job, modality, sample.id, f"sample-{number:02d}-{file_name(modality.name)}", write)
    roles = "original, reconstruction and difference"
    entries = [
        entry.picture("", picture, f"{sample.id}: {roles}", f"{shown.why} of the evaluated samples", "comparison")
    ]
    if modality.kind is Kind.AUDIO_WAVEFORM and modality.sample_rate_hz:
        entries += entry.sounds(collected.original(row), collected.reconstruction(row), shown.why)
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
            voxel_panels.histogram(observed, null),
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
                voxel_panels.slices(observed, modality.places, extent),
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

    def picture(self, suffix: str, picture: Picture, title: str, caption: str, role: str) -> dict[str, Any]:
        return self._written(
            f"pictures/{self.stem}{suffix}.png", images.png_bytes(picture), "image", title, caption, role
        )

    def sounds(self, original: NDArray[Any], given: NDArray[Any], why: str) -> list[dict[str, Any]]:
        rate = self.modality.sample_rate_hz or 0
        peak = max(float(np.abs(original).max()), 1e-9)
        return [
            self._written(
                f"sounds/{self.stem}-{role}.wav",
                images.wav_bytes(panels.as_signal(self.modality, signal), rate, peak),
                "audio",
                f"{self.sample}: {role}",
                why,
                role,
            )
            for role, signal in (("original", original), ("reconstruction", given))
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


def _picture(collected: Collected, samples: Sequence[Sample], row: int) -> Optional[Picture]:
    modality = collected.modality
    original, given = collected.original(row), collected.reconstruction(row)
    if modality.kind in (Kind.IMAGE, Kind.VIDEO):
        rows = _neighbours(collected, samples, row)
        marked = rows.index(row) if len(rows) > 1 else None
        return panels.film_strip(modality, _frames(collected, samples, rows), marked)
    if modality.kind is Kind.AUDIO_WAVEFORM:
        return panels.waveforms(modality, original, given)
    if modality.kind in (Kind.CODES, Kind.MEL, Kind.TEXT_EMBEDDING):
        return panels.matrices(modality, original, given)
    return None


def _frames(
    collected: Collected, samples: Sequence[Sample], rows: Sequence[int]
) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """(caption, original, reconstruction) of at most `MAX_FRAMES` frames of each row."""
    modality = collected.modality
    frames = []
    for r in rows:
        originals = panels.as_frames(modality, collected.original(r))
        given = panels.as_frames(modality, collected.reconstruction(r))
        kept = np.unique(np.linspace(0, len(originals) - 1, min(len(originals), panels.MAX_FRAMES)).round().astype(int))
        name = samples[collected.positions[r]].id
        for i in kept:
            caption = f"{name} {i}" if len(originals) > 1 else name
            frames.append((caption, originals[i], given[i]))
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
