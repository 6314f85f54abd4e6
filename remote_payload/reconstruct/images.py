"""PNG and WAV files from arrays: standard library and NumPy. The same array gives the same bytes."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""`(H, W, 3)` in RGB."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_bytes(picture: Picture) -> bytes:
    """An 8-bit RGB PNG, each row filtered by the difference that leaves it smallest."""
    height, width, channels = picture.shape
    if channels != 3 or picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 (H, W, 3), not {picture.dtype} {picture.shape}")
    rows = picture.reshape(height, width * 3).astype(np.int16)
    left = np.concatenate([np.zeros((height, 3), np.int16), rows[:, :-3]], axis=1)
    above = np.concatenate([np.zeros((1, width * 3), np.int16), rows[:-1]], axis=0)
    filtered = np.stack([rows, rows - left, rows - above]).astype(np.uint8)
    cost = np.abs(filtered.view(np.int8).astype(np.int16)).sum(axis=2)
    best = cost.argmin(axis=0)
    lines = np.concatenate([best[:, None].astype(np.uint8), filtered[best, np.arange(height)]], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def wav_bytes(signal: NDArray[Any], rate_hz: int, peak: float) -> bytes:
    """16-bit PCM of `(T,)` or `(T, C)`; `peak` is the value that becomes full scale. Louder values are clipped."""
    samples = signal[:, None] if signal.ndim == 1 else signal
    scaled = np.clip(np.nan_to_num(samples.astype(np.float64)) / peak, -1.0, 1.0)
    pcm = np.rint(scaled * 32767.0).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(pcm.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
