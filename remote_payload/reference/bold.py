"""BOLD simulated from features of the real stimuli. Nothing here was ever measured in a brain.

The film is played slowly: one frame a volume, so that a few seconds of film give a time series that a haemodynamic
response can be told apart in. Each part of a film is a run of its own: its response starts from rest, so no tail of a
training frame reaches a held-out volume.
"""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reference.brain import VoxelGrid
from remote_payload.reference.sound import MEL_BANDS

VOLUME_S = 0.8
"""Time between two volumes, and for how long a frame is shown."""
DELAY_VOLUMES = 4
"""A sample's volume is the one this many volumes after its window's last frame: the response peaks some 5 s late."""
_PATCH_ROWS, _PATCH_COLUMNS = 2, 2
_SOUND_BANDS = 2
_CENTRES_PER_FEATURE = 3
_SPREAD_MM = 22.0
NOISE_AUTOCORRELATION = 0.4
NOISE_DEVIATION = 0.4

Floats = NDArray[np.float64]


def stimulus_features(frames: NDArray[np.uint8], mel: Optional[NDArray[np.float32]]) -> tuple[Floats, list[str]]:
    """Features `(T, F)` of a segment and their names.

    Luminance and motion energy of 2 x 2 patches, contrast, colourfulness, and the log power of two sound bands (0 where
    the film is silent). `mel` is `(T, MEL_BANDS)`, one row a frame.
    """
    luminance = frames.astype(np.float64) @ np.array([0.2126, 0.7152, 0.0722]) / 255.0
    change = np.abs(np.diff(luminance, axis=0, prepend=luminance[:1]))
    colour = frames.astype(np.float64).std(axis=3).mean(axis=(1, 2)) / 255.0
    bands = np.zeros((len(frames), _SOUND_BANDS))
    if mel is not None:
        bands = mel.astype(np.float64).reshape(len(mel), _SOUND_BANDS, MEL_BANDS // _SOUND_BANDS).mean(axis=2)
    contrast = luminance.std(axis=(1, 2))
    columns = [_patch_means(luminance), _patch_means(change), contrast[:, None], colour[:, None], bands]
    patches = [f"{r},{c}" for r in range(_PATCH_ROWS) for c in range(_PATCH_COLUMNS)]
    names = [f"luminance {p}" for p in patches] + [f"motion energy {p}" for p in patches]
    names += ["contrast", "colourfulness"] + [f"sound band {b}" for b in range(_SOUND_BANDS)]
    return np.concatenate(columns, axis=1), names


def haemodynamic_response(step_s: float, length_s: float = 32.0) -> Floats:
    """The canonical double gamma (peak 6, undershoot 16, ratio 1/6, unit dispersion), sampled, with sum 1.

    Glover, NeuroImage 9:416 (1999), in the parameters of SPM's canonical response.
    """
    time_s = np.arange(0.0, length_s, step_s)
    peak = time_s**5 * np.exp(-time_s) / math.gamma(6)
    undershoot = time_s**15 * np.exp(-time_s) / math.gamma(16)
    response = peak - undershoot / 6.0
    return np.asarray(response / response.sum())


def simulate_run(
    features: Floats, weights: Floats, generator: np.random.Generator, noise: float = NOISE_DEVIATION
) -> Floats:
    """Volumes `(T + DELAY_VOLUMES, V)` of one run: convolved features times weights, plus AR(1) noise.

    `features` are z-scored; after the last frame the screen goes back to the run's mean.
    """
    response = haemodynamic_response(VOLUME_S)
    tail = np.zeros((DELAY_VOLUMES, features.shape[1]))
    shown = np.concatenate([features, tail])
    convolved = np.stack([np.convolve(c, response)[: len(shown)] for c in shown.T], axis=1)
    return convolved @ weights + noise * _autoregressive(len(shown), weights.shape[1], generator)


def voxel_weights(names: list[str], grid: VoxelGrid, generator: np.random.Generator) -> Floats:
    """Smooth maps `(F, V)`: visual features peak in the back of the brain, sound at its sides, each at a few places."""
    position_mm = grid.indices.astype(np.float64) * grid.spacing
    low, high = position_mm.min(axis=0), position_mm.max(axis=0)
    relative = (position_mm - low) / np.maximum(high - low, 1.0)
    visual = np.flatnonzero(relative[:, 1] < 0.4)
    lateral = np.flatnonzero((np.abs(relative[:, 0] - 0.5) > 0.3) & (np.abs(relative[:, 1] - 0.55) < 0.25))
    weights = np.zeros((len(names), len(position_mm)))
    for row, name in enumerate(names):
        region = lateral if name.startswith("sound") else visual
        for centre in generator.choice(region, _CENTRES_PER_FEATURE):
            squared = ((position_mm - position_mm[centre]) ** 2).sum(axis=1)
            weights[row] += generator.choice([-1.0, 1.0]) * np.exp(-squared / (2 * _SPREAD_MM**2))
    return weights


def _patch_means(values: Floats) -> Floats:
    rows = np.array_split(values, _PATCH_ROWS, axis=1)
    patches = [p.mean(axis=(1, 2)) for r in rows for p in np.array_split(r, _PATCH_COLUMNS, axis=2)]
    return np.stack(patches, axis=1)


def _autoregressive(length: int, width: int, generator: np.random.Generator) -> Floats:
    white = generator.standard_normal((length, width))
    series = np.empty_like(white)
    series[0] = white[0]
    keep = math.sqrt(1 - NOISE_AUTOCORRELATION**2)
    for t in range(1, length):
        series[t] = NOISE_AUTOCORRELATION * series[t - 1] + keep * white[t]
    return series
