"""What stands for a checkpoint that is a folder, until somebody reads it: its files' names, sizes and times."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator

from remote_payload.wire.chunks import Fingerprint

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
