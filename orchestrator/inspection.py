"""Header facts of a local checkpoint, read by the payload's reader in a process of its own.

The client knows nothing of checkpoint formats and never opens a pickle; a hostile file meets a process that it can at
worst waste, with a time limit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, IntegrityError, InternalError, RemoteEvalError
from remote_payload.wire.names import printable

INSPECT_TIMEOUT_S = 60.0
_UNREADABLE_STATUS = 2
_DAMAGED = ("truncated", "malformed")
_one_at_a_time = threading.Lock()


def inspect_local(path: Path) -> dict[str, Any]:
    """`{"header", "findings", "reads"}` of a file; the last are [offset, length] of what of it the header took.

    Not to be changed: for as long as the file stays the same, whoever asks gets the same. Raises `IntegrityError` for a
    damaged one, `CheckpointError` for none.
    """
    document = _document(path)
    if document.get("error"):
        raise unreadable(document["error"])
    return {key: document[key] for key in ("header", "findings", "reads")}


def inspect_ahead(path: Path) -> None:
    """Begin with what an `inspect_local` that is to come will take; that one hears what is wrong with the file."""

    def ask() -> None:
        with contextlib.suppress(RemoteEvalError, OSError):
            _document(path)

    threading.Thread(target=ask, name="inspect", daemon=True).start()


def render_local(path: Path) -> str:
    """The same as text for a terminal."""
    done = _run(path)
    if done.returncode == _UNREADABLE_STATUS:
        inspect_local(path)
        raise _no_answer(done)
    return printable(done.stdout.decode(errors="replace"))


def _document(path: Path) -> dict[str, Any]:
    try:
        facts = path.stat()
    except OSError:
        return _read_document(path)
    if not stat.S_ISREG(facts.st_mode):
        return _read_document(path)
    with _one_at_a_time:  # whoever asks for what is being read waits for it
        return _remembered(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@functools.lru_cache(maxsize=1)
def _remembered(path: Path, *_which_file_it_was: int) -> dict[str, Any]:
    return _read_document(path)


def _read_document(path: Path) -> dict[str, Any]:
    done = _run(path, "--json")
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise _no_answer(done) from None
    return document


def _run(path: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "remote_payload.checkpoint", *options, "--", str(path)]
    try:
        return subprocess.run(command, capture_output=True, timeout=INSPECT_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"reading the header of {path} took longer than {INSPECT_TIMEOUT_S:.0f} s",
            action="The file is damaged or made to be slow; check where it comes from.",
        ) from None


def unreadable(error: dict[str, Any]) -> RemoteEvalError:
    """What to raise for a header that could not be read: `kind`, `message` and `action` are the reader's own words."""
    kind = IntegrityError if error.get("kind") in _DAMAGED else CheckpointError
    return kind(
        printable(str(error.get("message"))), action=printable(str(error.get("action") or "Check --checkpoint."))
    )


def _no_answer(done: subprocess.CompletedProcess[bytes]) -> InternalError:
    details = printable(done.stderr.decode(errors="replace")[-4000:])
    return InternalError(f"the header reader gave no answer (exit status {done.returncode})", details=details)
