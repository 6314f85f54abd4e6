"""Listing an attempt's artifacts with size and sha256."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import stat
import time
from collections.abc import Iterator
from typing import Callable, Optional

from remote_payload.agent import attempts, files, root
from remote_payload.agent.failure import AgentError
from remote_payload.wire import names
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.layout import AttemptLayout
from remote_payload.wire.run_messages import AttemptRef, Manifest, ManifestEntry

MAX_FILES = 20_000
_PARTIAL_LIMIT_S = 60.0
_MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Inventory:
    """`left_out` holds [name, reason] of what lies among the artifacts and is none."""

    entries: tuple[ManifestEntry, ...]
    left_out: tuple[tuple[str, str], ...]


def manifest(request: AttemptRef) -> Manifest:
    """The attempt's manifest; for one that ended without, what can be listed within a minute, marked incomplete."""
    layout = root.open_root(request.root)
    attempt = layout.attempt(request.run_id, request.attempt)
    attempts.require_claim(attempt, request.nonce)
    try:
        value = files.read_json(attempt.manifest)
        if value is not None:
            return from_json(Manifest, value)
    except ValueError as error:
        raise AgentError("integrity", f"{attempt.manifest} is damaged: {error}") from error
    deadline = time.monotonic() + _PARTIAL_LIMIT_S
    return Manifest(take_inventory(attempt, lambda: time.monotonic() < deadline).entries, complete=False)


def take_inventory(attempt: AttemptLayout, go_on: Callable[[], bool]) -> Inventory:
    """Every regular file under `artifacts/` whose name can be trusted as a path, in order of name.

    Links, pipes and files with other names are left out. `go_on` is called often and ends the listing when False.
    """
    entries: list[ManifestEntry] = []
    left_out: list[tuple[str, str]] = []
    for relative in sorted(itertools.islice(_walk(attempt.artifacts, "", 1), 4 * MAX_FILES)):
        if len(entries) >= MAX_FILES:
            left_out.append((relative, f"more than {MAX_FILES} files"))
            continue
        if not go_on():
            break
        try:
            names.check_artifact_path(relative)
        except WireError:
            left_out.append((relative, "not a plain name"))
            continue
        digested = _digest(os.path.join(attempt.artifacts, relative), go_on)
        if digested is None:
            left_out.append((relative, "not a regular file, or not readable"))
        else:
            entries.append(ManifestEntry(relative, *digested))
    return Inventory(tuple(entries), tuple(left_out))


def _walk(folder: str, prefix: str, depth: int) -> Iterator[str]:
    if os.path.islink(folder):
        return
    try:
        with os.scandir(folder) as found:
            children = list(found)
    except OSError:
        return
    for child in children:
        relative = prefix + child.name
        if child.is_dir(follow_symlinks=False) and depth < _MAX_DEPTH:
            yield from _walk(child.path, relative + "/", depth + 1)
        else:
            yield relative


def _digest(path: str, go_on: Callable[[], bool]) -> Optional[tuple[int, str]]:
    """(size, sha256) of exactly the bytes read, or None for what is no regular file of ours to read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as file:
        digest, size = hashlib.sha256(), 0
        try:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
                size += len(block)
                if not go_on():
                    return None
        except OSError:
            return None
    return size, digest.hexdigest()
