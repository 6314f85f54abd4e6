"""Where this very code came from, so that it can start itself again as another process."""

from __future__ import annotations

import hashlib
import os
import sys
import zipimport
from collections.abc import Mapping
from typing import Optional

import remote_payload
from remote_payload.agent.bytecode import source_archive


def archive() -> Optional[str]:
    """The absolute path of the zipapp we run from, or None when we run from source."""
    spec = remote_payload.__spec__
    loader = spec.loader if spec is not None else None
    return source_archive(os.path.abspath(loader.archive)) if isinstance(loader, zipimport.zipimporter) else None


def archive_sha256() -> Optional[str]:
    path = archive()
    if path is None:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def command(payload: Optional[str] = None) -> list[str]:
    """The command that runs `payload`, or else this code, with the same interpreter; its arguments follow."""
    path = payload or archive()
    return [sys.executable, path] if path is not None else [sys.executable, "-m", "remote_payload"]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, with what `command` needs to find this code when it is run from source."""
    found = dict(base)
    if archive() is None:
        source = os.path.dirname(os.path.abspath(next(iter(remote_payload.__path__))))
        path = found.get("PYTHONPATH")
        found["PYTHONPATH"] = f"{source}{os.pathsep}{path}" if path else source
    return found
