"""What the content store holds, when it was last used, who still needs it; and freeing the rest.

A run that locates or sends a file notes that in the file's folder, since access times are off on many file systems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Optional

from remote_payload.agent import files
from remote_payload.agent.failure import AgentError
from remote_payload.agent.locks import try_lock
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import check_file_digest, check_run_id

UNCLAIMED_S = 600.0
"""So long after its last sign a run that was not launched yet, or an upload that broke off, still counts as under way.
One that comes back later sends again what was freed meanwhile."""
_MAX_USES_BYTES = 64 * 1024
_KEPT_USES_BYTES = 4 * 1024
_USE = re.compile(rb"(?m)^(\d{1,12}\.\d{6}) (\S{1,200})\n")
_NO_RUN = "-"
_LOCK_WAIT_S = 5.0
_POLL_S = 0.02


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """One file of the store, whole or in part, or one folder. `size`: its bytes on the disk; `to_come`: those that an
    upload under way will still take. `last_used` is in seconds of the node's clock."""

    digest: str
    folder: str
    size: int
    to_come: int
    last_used: float
    is_arriving: bool


@dataclasses.dataclass(frozen=True)
class _Use:
    at: float
    run_id: str


def note_use(layout: NodeLayout, digest: str, run_id: str) -> None:
    """Note that `run_id` (empty: nobody's run) uses the file now; a full disk does not stop it."""
    path = layout.checkpoint_uses(digest)
    # A line that a crash cut short must not swallow ours.
    line = f"\n{time.time():.6f} {check_run_id(run_id) if run_id else _NO_RUN}\n".encode()
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size <= _MAX_USES_BYTES:
                os.write(fd, line)
                return
            files.replace(path, os.pread(fd, _KEPT_USES_BYTES, size - _KEPT_USES_BYTES) + line)
        finally:
            os.close(fd)


def find(layout: NodeLayout, digest: str, size: int, run_id: str) -> Optional[os.stat_result]:
    """The stored file's facts, with its use by `run_id` noted; None where it is not in the store, or not believed.

    Whoever frees files sees the use, or has freed the file before it was looked for.
    """
    with _shared_lock(layout, digest):
        try:
            facts = os.lstat(layout.checkpoint(digest))
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            return None
        note_use(layout, digest, run_id)
        return facts if _is_believed(layout, digest) else None


def find_tree(layout: NodeLayout, digest: str, size: int, run_id: str) -> Optional[os.stat_result]:
    """As `find`, for a stored folder whose files have `size` bytes together; the facts are the folder's own."""
    tree = layout.checkpoint_tree(digest)
    with _shared_lock(layout, digest):
        try:
            facts = os.lstat(tree)
            if not stat.S_ISDIR(facts.st_mode) or sum(one.st_size for one in _below(tree).values()) != size:
                return None
        except FileNotFoundError:
            return None
        note_use(layout, digest, run_id)
        return facts if _is_believed(layout, digest) else None


def digest_of_path(layout: NodeLayout, path: str) -> Optional[str]:
    """The digest of the stored file or folder at `path`; None for a path that is none of the store's."""
    folder, _ = os.path.split(path)
    with contextlib.suppress(WireError):
        digest = _digest_of_name(os.path.basename(folder))
        return digest if path in (layout.checkpoint(digest), layout.checkpoint_tree(digest)) else None
    return None


def stored_files(layout: NodeLayout) -> list[StoredFile]:
    """Everything in the store, in no order."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(layout.checkpoints) as entries:
        for entry in entries:
            with contextlib.suppress(WireError, FileNotFoundError, NotADirectoryError):
                digest = _digest_of_name(entry.name)
                if not entry.is_symlink():
                    found.append(_measure(layout, digest))
    return found


def pins(layout: NodeLayout, stored: Sequence[StoredFile]) -> dict[str, tuple[str, ...]]:
    """By folder, who needs a file now: ids of runs under way, or `an upload`. What nobody needs is left out. A run that
    was not launched yet needs all it used, as long as it gives signs of life at any file of `stored`."""
    # Imported when used: that takes as long as half of an agent's other imports, and most uploads need no room made.
    from remote_payload.agent import needs

    under_way = needs.by_folder(layout)
    uses = {file.folder: [use for use in _uses(layout, file.digest) if use.run_id != _NO_RUN] for file in stored}
    last_sign: dict[str, float] = {}
    for file in stored:
        for use in uses[file.folder]:
            last_sign[use.run_id] = max(use.at, last_sign.get(use.run_id, 0.0))
    for file in stored:
        if file.is_arriving and uses[file.folder]:
            last_sign[uses[file.folder][-1].run_id] = time.time()
    pinned: dict[str, tuple[str, ...]] = {}
    for file in stored:
        by_runs = uses[file.folder]
        needed_by = set(under_way.get(file.folder, ()))
        needed_by.update(
            use.run_id
            for use in by_runs
            if _is_recent(last_sign[use.run_id]) and not needs.ended_since(layout, use.run_id, use.at)
        )
        if file.is_arriving:
            needed_by.add(by_runs[-1].run_id if by_runs else "an upload")
        if needed_by:
            pinned[file.folder] = tuple(sorted(needed_by))
    return pinned


def least_recently_used(
    stored: Iterable[StoredFile], pinned: Mapping[str, object], excess_bytes: int
) -> list[StoredFile]:
    """What goes so that `excess_bytes` are freed: the least recently used of what nobody needs; all of that where it
    does not suffice."""
    chosen: list[StoredFile] = []
    for file in sorted(stored, key=lambda file: file.last_used):
        if excess_bytes <= 0:
            break
        if file.folder not in pinned:
            chosen.append(file)
            excess_bytes -= file.size
    return chosen


def free(layout: NodeLayout, file: StoredFile) -> bool:
    """Delete it, unless it came into use since it was looked at."""
    try:
        fd = os.open(layout.checkpoint_lock(file.digest), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd, fcntl.LOCK_EX) or any(use.at > file.last_used for use in _uses(layout, file.digest)):
            return False
        doomed = move_away(layout, file.folder)
    finally:
        os.close(fd)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def move_away(layout: NodeLayout, path: str) -> str:
    """Take `path` out of the way in one step, so that nothing half deleted ever looks whole; where it is then."""
    doomed = layout.doomed(path)
    shutil.rmtree(doomed, ignore_errors=True)  # what an interrupted deletion left
    try:
        os.rename(path, doomed)
    except OSError as error:
        raise AgentError("internal", f"{path} cannot be deleted: {error.strerror}") from error
    return doomed


def _is_believed(layout: NodeLayout, digest: str) -> bool:
    # Imported when used: what is sent for the first time is not found.
    from remote_payload.agent.stored_chunks import StoredChunks

    return StoredChunks(layout, digest).is_believed


def _digest_of_name(folder_name: str) -> str:
    return check_file_digest(folder_name.replace("-", ":", 1))


def _measure(layout: NodeLayout, digest: str) -> StoredFile:
    folder, part = layout.checkpoint_folder(digest), layout.checkpoint_part(digest)
    facts = {folder: os.lstat(folder), **_below(folder)}
    size = sum(one.st_blocks * 512 for one in facts.values())
    signs = [facts[path].st_mtime for path in (part, layout.checkpoint_journal(digest)) if path in facts]
    used = [use.at for use in _uses(layout, digest)]
    is_locked = _is_locked(layout.checkpoint_lock(digest))
    is_arriving = is_locked or any(map(_is_recent, signs))
    to_come = max(0, facts[part].st_size - facts[part].st_blocks * 512) if is_locked and part in facts else 0
    last_used = max([*used, *signs] if used else (one.st_mtime for one in facts.values()))
    return StoredFile(digest, folder, size, to_come, last_used, is_arriving)


def _below(folder: str) -> dict[str, os.stat_result]:
    """Facts of every file below `folder`, and of no link's target. Raises `OSError`."""

    def refuse(error: OSError) -> None:
        raise error

    facts = {}
    for where, _, file_names in os.walk(folder, onerror=refuse):
        for name in file_names:
            path = os.path.join(where, name)
            with contextlib.suppress(FileNotFoundError):
                facts[path] = os.lstat(path)
    return facts


def _is_recent(at: float) -> bool:
    """Times that are yet to come are of a clock that was wrong."""
    return abs(time.time() - at) < UNCLAIMED_S


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _shared_lock(layout: NodeLayout, digest: str) -> Iterator[None]:
    """Keeps the file from being freed, unless somebody else holds the lock for seconds: an upload, which does too."""
    try:
        fd = os.open(layout.checkpoint_lock(digest), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not try_lock(fd, fcntl.LOCK_SH) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _uses(layout: NodeLayout, digest: str) -> list[_Use]:
    data = files.read_up_to(layout.checkpoint_uses(digest), 2 * _MAX_USES_BYTES) or b""
    return [_Use(float(match.group(1)), match.group(2).decode("ascii", "replace")) for match in _USE.finditer(data)]
