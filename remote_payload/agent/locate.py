"""Finding a file that is already on the node: in place, in the store, or anywhere under the search roots."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any, Callable, Optional

from remote_payload.agent import root, store
from remote_payload.agent.digests import DigestCache, OutOfTimeError, digest_of, state_of_file
from remote_payload.agent.failure import AgentError
from remote_payload.wire.folders import folder_fingerprint
from remote_payload.wire.layout import NodeLayout, is_part
from remote_payload.wire.messages import Located, LocateRequest

MAX_DEPTH = 8
MAX_ENTRIES = 50_000
_MAX_SAMPLE_BYTES = 64 * 1024 * 1024
_NOWHERE = Located(False, "nowhere")


def locate(request: LocateRequest) -> Located:
    """Where the file is, if it is here. A path is only looked at; contents are compared by sample, then by digest.

    A folder is found in place, or by digest in the store. Raises `AgentError` usage for a path that is there and is
    neither a readable regular file nor a folder that can be listed.
    """
    layout = root.open_root(request.root)
    cache = DigestCache(layout)
    if request.path is not None:
        return _in_place(layout, request, request.path, cache)
    if request.digest is None or request.size is None:
        raise AgentError("usage", "locate needs a path, or a digest and a size")
    return _in_store(layout, request.digest, request.size, request.run_id) or _by_content(request, cache)


def _in_place(layout: NodeLayout, request: LocateRequest, wanted: str, cache: DigestCache) -> Located:
    for path in _absolute_candidates(wanted, request.search_roots):
        try:
            facts = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise AgentError("usage", f"{path} cannot be looked at: {error.strerror}") from error
        if stat.S_ISDIR(facts.st_mode):
            return _folder_in_place(layout, path, request.run_id)
        if not stat.S_ISREG(facts.st_mode):
            raise AgentError("usage", f"{path} is no regular file")
        if not os.access(path, os.R_OK):
            raise AgentError("usage", f"{path} may not be read by this user", f"Run `chmod u+r {path}` on the node.")
        if is_part(os.path.realpath(path)):
            raise AgentError(
                "usage",
                f"{path} is a checkpoint that has not arrived in full",
                "Name the checkpoint where it was sent from: what is missing on this node is sent then.",
            )
        found = state_of_file(path)
        digest = store.digest_of_path(layout, path)
        if digest is not None:
            store.find(layout, digest, found.size, request.run_id)
        return Located(True, "in_place", path, cache.get(path, found), found.size, found.mtime_ns, found.inode)
    return _NOWHERE


def _folder_in_place(layout: NodeLayout, path: str, run_id: str) -> Located:
    """A checkpoint of several files. It has no digest; names, sizes and times of its files stand for it."""
    try:
        found = folder_fingerprint(path)
    except OSError as error:
        raise AgentError("usage", f"{path} may not be listed by this user: {error.strerror}") from error
    except ValueError as error:
        raise AgentError("usage", str(error), "Name the folder of one checkpoint.") from error
    digest = store.digest_of_path(layout, path)
    if digest is not None:
        store.find_tree(layout, digest, found.size, run_id)
    return Located(True, "in_place", path, None, found.size, found.mtime_ns, found.inode)


def _absolute_candidates(wanted: str, search_roots: Iterable[str]) -> Iterator[str]:
    if "\0" in wanted:
        raise AgentError("usage", f"{wanted!r} is no path")
    if os.path.isabs(wanted):
        # As it is written first: a dollar sign may be part of a name.
        yield os.path.normpath(wanted)
    expanded = os.path.expanduser(os.path.expandvars(wanted))
    if os.path.isabs(expanded):
        yield os.path.normpath(expanded)
        return
    for folder in search_roots:
        yield os.path.normpath(os.path.join(root.expand(folder, "checkpoint root"), expanded))
    yield os.path.normpath(os.path.join(os.path.expanduser("~"), expanded))


def _in_store(layout: NodeLayout, digest: str, size: int, run_id: str) -> Optional[Located]:
    """A stored file or folder was verified before it got its name."""
    path, facts = layout.checkpoint(digest), store.find(layout, digest, size, run_id)
    if facts is None:
        path, facts = layout.checkpoint_tree(digest), store.find_tree(layout, digest, size, run_id)
    if facts is None:
        return None
    return Located(True, "store", path, digest, size, facts.st_mtime_ns, facts.st_ino)


def _by_content(request: LocateRequest, cache: DigestCache) -> Located:
    deadline = time.monotonic() + request.time_limit_s

    def go_on() -> bool:
        return time.monotonic() < deadline

    for path in same_size_files(request, go_on):
        try:
            if not _matches_sample(path, request.sample):
                continue
            found, digest = digest_of(path, cache, go_on)
        except OutOfTimeError:
            break
        except (OSError, EOFError, ValueError):
            continue
        if digest == request.digest:
            return Located(True, "by_content", path, digest, found.size, found.mtime_ns, found.inode)
    return _NOWHERE


def same_size_files(request: LocateRequest, go_on: Callable[[], bool]) -> Iterator[str]:
    """Regular files of the wanted size, the shallowest first. Links to folders are not followed."""
    queue = [(root.expand(folder, "checkpoint root"), 0) for folder in request.search_roots]
    seen = 0
    while queue and go_on():
        folder, depth = queue.pop(0)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES or not go_on():
                        return
                    if entry.is_dir(follow_symlinks=False):
                        if depth < MAX_DEPTH:
                            queue.append((entry.path, depth + 1))
                    elif entry.is_file() and entry.stat().st_size == request.size and not is_part(entry.path):
                        yield entry.path
        except OSError:
            continue


def _matches_sample(path: str, sample: Iterable[tuple[Any, ...]]) -> bool:
    with open(path, "rb") as file:
        for span in sample:
            if len(span) != 3 or not isinstance(span[0], int) or not isinstance(span[1], int):
                raise AgentError("usage", "a sample span is [offset, length, sha256]")
            offset, length, wanted = span
            if not (offset >= 0 and 0 < length <= _MAX_SAMPLE_BYTES):
                raise AgentError("usage", f"a sample span of {length} bytes at {offset} is out of bounds")
            file.seek(offset)
            if hashlib.sha256(file.read(length)).hexdigest() != wanted:
                return False
    return True
