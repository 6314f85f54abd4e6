"""Which pictures and sounds may stand in a report: judged by their bytes, never by their names. Pure but for `load`."""

from __future__ import annotations

import base64
import dataclasses
import struct
from pathlib import Path

MAX_PICTURE_BYTES = 4 * 1024 * 1024
MAX_PIXELS = 40_000_000
"""A small file can declare a picture that takes gigabytes to decode; beyond this it is left out."""
_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})


class UnsafeMediaError(ValueError):
    """The file is none of PNG, JPEG, WebP and WAV, or too large; the message says which."""


@dataclasses.dataclass(frozen=True)
class Media:
    """A checked file. `width` and `height` are in pixels, None for sound."""

    mime: str
    data: bytes
    width: int | None = None
    height: int | None = None

    @property
    def uri(self) -> str:
        """The whole file as a `data:` URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    @property
    def uri_length(self) -> int:
        """Characters of `uri`, without making it."""
        return len(f"data:{self.mime};base64,") + 4 * ((len(self.data) + 2) // 3)


def load(path: Path, kind: str) -> Media:
    """Read and check the file of an `image` or `audio`. Raises `UnsafeMediaError`."""
    try:
        if path.is_symlink() or not path.is_file():
            raise UnsafeMediaError("the file is not here")
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise UnsafeMediaError(f"{size} bytes are more than the {MAX_PICTURE_BYTES} that a picture may have")
        data = path.read_bytes()
    except OSError as error:
        raise UnsafeMediaError(f"the file could not be read: {error.strerror}") from error
    media = identify(data)
    if (media.width is None) != (kind == "audio"):
        raise UnsafeMediaError(f"the file is {media.mime}, declared as {kind}")
    return media


def identify(data: bytes) -> Media:
    """What `data` is by its magic bytes and header. Raises `UnsafeMediaError` for anything but the four formats."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            if data[12:16] != b"IHDR":
                raise UnsafeMediaError("a PNG without its header")
            media = Media("image/png", data, *struct.unpack(">II", data[16:24]))
        elif data.startswith(b"\xff\xd8\xff"):
            media = Media("image/jpeg", data, *_jpeg_size(data))
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            media = Media("image/webp", data, *_webp_size(data))
        elif data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            return Media("audio/wav", data)
        else:
            raise UnsafeMediaError("the file is none of PNG, JPEG, WebP and WAV")
    except (struct.error, IndexError):
        raise UnsafeMediaError("the file ends within its header") from None
    pixels = (media.width or 0) * (media.height or 0)
    if not 0 < pixels <= MAX_PIXELS:
        raise UnsafeMediaError(f"{media.width} × {media.height} pixels")
    return media


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise UnsafeMediaError("a JPEG with a damaged header")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        if marker in (0xD9, 0xDA):
            raise UnsafeMediaError("a JPEG without a frame header")
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    form = data[12:16]
    if form == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if form == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if form == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise UnsafeMediaError("a WebP of an unknown form")
