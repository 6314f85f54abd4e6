"""File systems that share blocks between files, each on a loop device of its own, where this user may mount one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_KINDS = {"xfs": ("-q", "-m", "reflink=1"), "btrfs": ("-q",)}
_IMAGE_BYTES = 320 * 1024 * 1024
_PATIENCE_S = 60.0


def mountable() -> list[str]:
    """The kinds that can be made and mounted here."""
    known = Path("/proc/filesystems")
    if os.geteuid() != 0 or not known.is_file() or not Path("/dev/loop-control").exists():
        return []
    return [kind for kind in _KINDS if kind in known.read_text().split() and shutil.which(f"mkfs.{kind}")]


@contextlib.contextmanager
def mounted(kind: str, base: Path) -> Iterator[Path]:
    """A new file system of the kind, mounted below `base`."""
    image, folder = base / "image", base / kind
    image.touch()
    os.truncate(image, _IMAGE_BYTES)
    folder.mkdir()
    _run(f"mkfs.{kind}", *_KINDS[kind], str(image))
    _run("mount", "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        _run("umount", str(folder))


def used_bytes(folder: Path) -> int:
    """What is taken of the disk that holds `folder`, with everything written."""
    os.sync()
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=_PATIENCE_S, stdout=subprocess.DEVNULL)
