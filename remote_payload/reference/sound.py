"""Audio codes of the real sound: log-mel frames through a residual vector quantiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remote_payload.reference.sizes import CODEBOOKS, CODES_PER_BOOK

MEL_BANDS = 40
_WINDOW_SAMPLES = 1024
_LOWEST_HZ, _HIGHEST_HZ = 50.0, 12_000.0
_FLOOR = 1e-5
_KMEANS_ROUNDS = 5
_LOG_GAINS = (-2.0, 0.0, 2.0)

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Codebooks `(8, 1024, MEL_BANDS)`: each quantises what the ones before it left over.

    The entries of a book are ordered by their mean, so a larger code of the first book is a louder frame.
    """

    books: Floats

    def encode(self, frames: Floats) -> NDArray[np.int16]:
        """Codes `(8, n)` of log-mel frames `(n, MEL_BANDS)`."""
        left = frames
        codes = []
        for book in self.books:
            nearest = _nearest(left, book)
            left = left - book[nearest]
            codes.append(nearest.astype(np.int16))
        return np.stack(codes)


def log_mel(sound: Floats, rate_hz: int, centres_s: NDArray[np.floating[Any]]) -> Floats:
    """Natural log of mel power `(n, MEL_BANDS)` of Hann windows of 1024 samples about the given times."""
    padded = np.pad(sound, _WINDOW_SAMPLES)
    starts = np.rint(centres_s * rate_hz).astype(np.int64) + _WINDOW_SAMPLES // 2
    starts = np.clip(starts, 0, len(padded) - _WINDOW_SAMPLES)
    windows = padded[starts[:, None] + np.arange(_WINDOW_SAMPLES)] * np.hanning(_WINDOW_SAMPLES).astype(np.float32)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    mel = power @ _mel_filters(rate_hz).T
    return np.asarray(np.log(np.maximum(mel, _FLOOR)), dtype=np.float32)


def train_quantiser(frames: Floats, seed: int) -> Quantiser:
    """k-means for one book after another on the residuals of `frames` `(n, MEL_BANDS)`.

    The frames are taken at several loudnesses, so that the books also fit sound that is louder or softer than these.
    """
    generator = np.random.default_rng(seed)
    left, books = np.concatenate([frames + np.float32(gain) for gain in _LOG_GAINS]), []
    for _ in range(CODEBOOKS):
        book = _kmeans(left, generator)
        book = book[np.argsort(book.mean(axis=1), kind="stable")]
        left = left - book[_nearest(left, book)]
        books.append(book)
    return Quantiser(np.stack(books))


def _kmeans(points: Floats, generator: np.random.Generator) -> Floats:
    replace = len(points) < CODES_PER_BOOK
    centres = points[generator.choice(len(points), CODES_PER_BOOK, replace=replace)].copy()
    for _ in range(_KMEANS_ROUNDS):
        nearest = _nearest(points, centres)
        counts = np.bincount(nearest, minlength=CODES_PER_BOOK)
        sums = np.zeros(centres.shape, dtype=np.float64)
        np.add.at(sums, nearest, points)
        used = counts > 0
        centres[used] = (sums[used] / counts[used, None]).astype(np.float32)
    return np.asarray(centres)


def _nearest(points: Floats, centres: Floats) -> NDArray[np.int64]:
    distances = (centres**2).sum(axis=1) - 2.0 * points @ centres.T
    nearest: NDArray[np.int64] = distances.argmin(axis=1)
    return nearest


def _mel_filters(rate_hz: int) -> Floats:
    """Triangular filters `(MEL_BANDS, 513)`, evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    edges_mel = np.linspace(_to_mel(_LOWEST_HZ), _to_mel(min(_HIGHEST_HZ, rate_hz / 2)), MEL_BANDS + 2)
    edges_hz = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    bins_hz = np.fft.rfftfreq(_WINDOW_SAMPLES, 1.0 / rate_hz)
    lower, middle, upper = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising, falling = (bins_hz - lower) / (middle - lower), (upper - bins_hz) / (upper - middle)
    filters: Floats = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    return filters


def _to_mel(frequency_hz: float) -> float:
    return float(2595.0 * np.log10(1.0 + frequency_hz / 700.0))
