"""What may stand in a report as a picture."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from report_run_maker import png, wav

from orchestrator.report.media import MAX_PICTURE_BYTES, UnsafeMediaError, identify, load

JPEG = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08\x00\x05\x00\x09\x01\x01\x11\x00"
WEBP_LOSSLESS = b"RIFF\x00\x00\x00\x00WEBPVP8L\x00\x00\x00\x00\x2f" + (8 | 4 << 14).to_bytes(4, "little")
WEBP_LOSSY = b"RIFF\x00\x00\x00\x00WEBPVP8 \x00\x00\x00\x00\x00\x00\x00\x9d\x01\x2a\x09\x00\x05\x00"
WEBP_EXTENDED = b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x04\x00\x00"


@pytest.mark.parametrize(
    ("data", "mime", "size"),
    [
        (png(7, 5), "image/png", (7, 5)),
        (JPEG, "image/jpeg", (9, 5)),
        (WEBP_LOSSLESS, "image/webp", (9, 5)),
        (WEBP_LOSSY, "image/webp", (9, 5)),
        (WEBP_EXTENDED, "image/webp", (9, 5)),
        (wav(), "audio/wav", (None, None)),
    ],
)
def test_the_four_formats_are_told_by_their_bytes(data: bytes, mime: str, size: tuple[int | None, int | None]) -> None:
    media = identify(data)
    assert (media.mime, (media.width, media.height)) == (mime, size)
    assert base64.b64decode(media.uri.partition(",")[2]) == data
    assert media.uri_length == len(media.uri)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"<!doctype html><script>alert(1)</script>",
        b"GIF89a\x01\x00\x01\x00",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x00\x00\x00\x00AVI LIST",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xda\x00\x02",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafeMediaError):
        identify(data)


@pytest.mark.parametrize("data", [png(7, 5), JPEG, WEBP_LOSSLESS, WEBP_LOSSY, WEBP_EXTENDED])
def test_a_file_cut_anywhere_is_refused_or_identified_and_never_crashes(data: bytes) -> None:
    for end in range(len(data)):
        try:
            identify(data[:end])
        except UnsafeMediaError:
            continue


def test_a_small_file_that_declares_a_vast_picture_is_refused() -> None:
    with pytest.raises(UnsafeMediaError, match="pixels"):
        identify(png(4, 4, declared=(100_000, 100_000)))


def test_a_picture_must_be_of_the_declared_kind_here_and_small(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    assert load(path, "image").mime == "image/png"
    with pytest.raises(UnsafeMediaError, match="declared as audio"):
        load(path, "audio")
    with pytest.raises(UnsafeMediaError, match="not here"):
        load(tmp_path / "absent.png", "image")
    (tmp_path / "link.png").symlink_to(path)
    with pytest.raises(UnsafeMediaError, match="not here"):
        load(tmp_path / "link.png", "image")
    path.write_bytes(png() + bytes(MAX_PICTURE_BYTES))
    with pytest.raises(UnsafeMediaError, match="more than"):
        load(path, "image")
