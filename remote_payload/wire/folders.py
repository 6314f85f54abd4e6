"""What stands for a checkpoint that is a folder, until somebody reads it: its files' names, sizes and times."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Optional

from remote_payload.wire.chunks import Fingerprint
from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_member_path

MAX_FILES = 20_000
MAX_DEPTH = 3


def folder_fingerprint(folder: str) -> Fingerprint:
    """`size` adds up the files, `mtime_ns` is the newest, `inode` digests names, sizes and times of all of them.

    Files up to `MAX_DEPTH` folders below count, links to files as what they lead to; links to folders do not. Raises
    `OSError`, and `ValueError` for more than `MAX_FILES` entries.
    """
    listing = hashlib.sha256()
    size, newest = 0, 0
    for name, facts in sorted(folder_files(folder), key=lambda pair: pair[0]):
        size += facts.st_size
        newest = max(newest, facts.st_mtime_ns)
        listing.update(os.fsencode(name) + b"\0" + f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}\n".encode())
    # 60 bits travel unharmed through every JSON reader that knows 64-bit integers.
    return Fingerprint(folder, size, newest, int.from_bytes(listing.digest()[:8], "big") >> 4)


class UnsendableError(ValueError):
    """A folder that does not go to another machine as it is. `action` says what to do."""

    def __init__(self, cause: str, action: str) -> None:
        super().__init__(cause)
        self.action = action


def sendable_files(folder: str) -> list[tuple[str, os.stat_result]]:
    """What `folder_files` finds, in the order of the names, if all of it may go to another machine.

    A link counts as the file that it leads to. Raises `UnsendableError` for a name that could lead elsewhere, a link
    out of the folder but to a blob of the model hub's cache that the folder is a snapshot in, what is no regular file,
    and a folder without files or with too many; `OSError`.
    """
    base = os.path.realpath(folder)
    blobs = _blobs_beside(base)
    found = []
    try:
        for name, facts in folder_files(folder):
            check_member_path(name)
            path = os.path.join(folder, name)
            if not stat.S_ISREG(facts.st_mode):
                raise UnsendableError(f"{path} is no regular file", "Take it out of the folder.")
            target = os.path.realpath(path)
            if not target.startswith(base + os.sep) and os.path.dirname(target) != blobs:
                raise UnsendableError(
                    f"{path} is a link that leads out of the folder", "Use a copy without links, made by `cp -rL`."
                )
            found.append((name, facts))
    except WireError as error:
        raise UnsendableError(f"{folder}: {error}", "Rename that file, or leave it out.") from error
    except UnsendableError:
        raise
    except ValueError as error:
        raise UnsendableError(str(error), "Name the folder of one checkpoint.") from error
    if not found:
        raise UnsendableError(f"{folder} holds no files", "Check the path.")
    return sorted(found, key=lambda pair: pair[0])


def _blobs_beside(base: str) -> Optional[str]:
    """Where a HuggingFace cache keeps the files of the snapshot that `base` is, or lies in: `models--x--y/blobs`; the
    snapshot holds links to them."""
    parts = base.split(os.sep)
    for index in range(len(parts) - 2, 1, -1):
        if parts[index] == "snapshots" and parts[index - 1].startswith("models--"):
            return os.sep.join([*parts[:index], "blobs"])
    return None


def folder_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """(name relative to `folder`, facts) of every file that counts. Raises as `folder_fingerprint`."""
    pending, seen = [("", 0)], 0
    while pending:
        below, depth = pending.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                seen += 1
                if seen > MAX_FILES:
                    raise ValueError(f"{folder} holds more than {MAX_FILES} files")
                name = os.path.join(below, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if depth < MAX_DEPTH:
                        pending.append((name, depth + 1))
                    continue
                try:
                    facts = entry.stat()
                except OSError:
                    # A link that leads nowhere, or to itself, is part of the listing by its own facts.
                    facts = entry.stat(follow_symlinks=False)
                if not stat.S_ISDIR(facts.st_mode):
                    yield name, facts
