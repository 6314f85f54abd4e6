"""Header facts of a local checkpoint, read by the payload's reader in a process of its own.

The client knows nothing of checkpoint formats and never opens a pickle; a hostile file meets a process that it can at
worst waste, with a time limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, InternalError
from remote_payload.wire.names import printable

INSPECT_TIMEOUT_S = 60.0


def inspect_local(path: Path) -> dict[str, Any]:
    """The header as JSON. Raises `CheckpointError` where the file is no checkpoint that can be read."""
    command = [sys.executable, "-m", "remote_payload.checkpoint", "--json", "--", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=INSPECT_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"reading the header of {path} took longer than {INSPECT_TIMEOUT_S:.0f} s",
            action="The file is damaged or made to be slow; check where it comes from.",
        ) from None
    try:
        document = json.loads(done.stdout)
    except ValueError:
        details = printable(done.stderr.decode(errors="replace")[-4000:])
        raise InternalError(
            f"the header reader gave no answer (exit status {done.returncode})", details=details
        ) from None
    if "error" in document:
        raise CheckpointError(printable(str(document["error"])), action="Check --checkpoint.")
    return dict(document)


def render_local(path: Path) -> str:
    """The header as text for a terminal. Raises as `inspect_local`."""
    return str(inspect_local(path, text=True)["text"])
