"""How the files of a stored checkpoint stood when they were verified, as `verified.json` beside them says.

A file that stands so still has not been written to since: nobody can set the time of its last change, as one can that
of its last modification. Losing the record costs a reading, never correctness.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from remote_payload.agent import files
from remote_payload.wire.layout import NodeLayout


class FileState(NamedTuple):
    """What any write to a file changes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def state_of(facts: os.stat_result) -> FileState:
    return FileState(facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


def state_at(path: str) -> Optional[FileState]:
    """None for what is no regular file that can be read. It is opened: network file systems look anew only then."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
    finally:
        os.close(fd)
    return state_of(facts) if stat.S_ISREG(facts.st_mode) else None


def recorded(layout: NodeLayout, digest: str, count: int) -> list[Optional[FileState]]:
    """Of each of the checkpoint's `count` files, in order; None where nothing is known of one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        value = files.read_json(layout.checkpoint_verified(digest))
        if value["digest"] == digest and len(value["files"]) == count:
            return [FileState(*state) if state is not None else None for state in value["files"]]
    return [None] * count


def record(layout: NodeLayout, digest: str, states: Sequence[Optional[FileState]]) -> None:
    """For files that were verified, and have not been written to since. On a full disk nothing is recorded."""
    with contextlib.suppress(OSError):
        files.replace(
            layout.checkpoint_verified(digest), files.json_bytes({"digest": digest, "files": [*map(_json, states)]})
        )


@contextlib.contextmanager
def renewed(layout: NodeLayout, digest: str, paths: Sequence[str]) -> Iterator[None]:
    """For a context in which these files of the checkpoint get or lose another name, which is a change, and of nothing
    that was verified."""
    known = recorded(layout, digest, len(paths))
    before = [state_at(path) for path in paths]
    yield
    now = [
        _if_only_renamed(state, state_at(path)) if state is not None and state == was else state
        for state, was, path in zip(known, before, paths)
    ]
    if now != known:
        record(layout, digest, now)


def _if_only_renamed(before: FileState, after: Optional[FileState]) -> Optional[FileState]:
    return after if after is not None and after._replace(ctime_ns=before.ctime_ns) == before else before


def _json(state: Optional[FileState]) -> Optional[list[int]]:
    return None if state is None else list(state)
