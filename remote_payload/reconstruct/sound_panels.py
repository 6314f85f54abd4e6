"""A waveform as its envelope over its spectrogram."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import drawing, panels
from remote_payload.reconstruct.images import Picture
from remote_payload.reconstruct.protocol import Modality
from remote_payload.reconstruct.statistics import Floats

_WIDTH = 640
ENVELOPE_HEIGHT, SPECTROGRAM_HEIGHT = 60, 110
_WINDOW = 256
_FLOOR_DB = 80.0
_DIFFERENCE_DB = 30.0


def waveforms(modality: Modality, arrays: panels.Arrays) -> Picture:
    """Envelope and spectrogram of each signal's first channel, on the original's scales."""
    signals = [np.nan_to_num(panels.as_signal(modality, a)[:, 0].astype(np.float64)) for a in arrays]
    extent = max(float(np.abs(signals[0]).max()), 1e-9)
    powers = [_spectrogram(s) for s in signals]
    # The quietest that is shown: 80 dB below the original's loudest.
    peak = max(float(powers[0].max()), 1e-20)
    levels = [10.0 * np.log10(np.maximum(p / peak, 10.0 ** (-_FLOOR_DB / 10.0))) for p in powers]
    tiles = [_both(s, extent, drawing.sequential(level, -_FLOOR_DB, 0.0)) for s, level in zip(signals, levels)]
    louder = drawing.diverging(levels[1] - levels[0], _DIFFERENCE_DB)
    tiles.insert(2, _both(signals[1] - signals[0], extent, louder))
    rate, length = modality.sample_rate_hz, len(signals[0])
    axes = f"{length / rate:.3g} s, 0 to {rate / 2:g} Hz" if rate else f"{length} values, up to the Nyquist frequency"
    return panels.grid(
        [("", tiles)],
        [
            f"above: envelope, full height +-{extent:.3g} {modality.unit}; below: spectrogram, {axes}",
            f"dark -{_FLOOR_DB:g} dB, yellow 0 dB of the original's loudest",
            f"difference: reconstruction - original; below blue -{_DIFFERENCE_DB:g} dB, white 0, "
            f"red +{_DIFFERENCE_DB:g} dB",
        ],
    )


def _spectrogram(signal: Floats) -> Floats:
    """Power `(frequencies, times)`, high frequencies first; as many times as the panel is wide, or fewer."""
    window = min(_WINDOW, max(16, len(signal)))
    padded = np.pad(signal, (window // 2, max(window // 2, window - len(signal))), mode="symmetric")
    times = min(_WIDTH, max(1, 4 * len(signal) // window))
    starts = np.linspace(0, len(padded) - window, times).astype(np.int64)
    pieces = np.stack([padded[start : start + window] for start in starts]) * np.hanning(window)
    return np.asarray((np.abs(np.fft.rfft(pieces, axis=1)) ** 2).T[::-1])


def _both(signal: Floats, extent: float, spectrogram: Picture) -> Picture:
    below = drawing.resized(spectrogram, SPECTROGRAM_HEIGHT, _WIDTH)
    return np.concatenate([_envelope(signal, extent), below])


def _envelope(signal: NDArray[Any], extent: float) -> Picture:
    picture = drawing.canvas(ENVELOPE_HEIGHT, _WIDTH)
    edges = np.linspace(0, len(signal), _WIDTH + 1).astype(int)
    for column in range(_WIDTH):
        start = min(edges[column], len(signal) - 1)
        piece = signal[start : max(start + 1, edges[column + 1])]
        top, bottom = ((1 - np.clip(v / extent, -1, 1)) / 2 * (ENVELOPE_HEIGHT - 1) for v in (piece.max(), piece.min()))
        drawing.fill(picture, int(top), column, int(bottom) + 1, column + 1, drawing.ACCENT)
    return picture
