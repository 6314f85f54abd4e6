"""The ends of an attempt's logs, for a report on a failure: harmless text, bounded."""

from __future__ import annotations

import dataclasses
import os

from orchestrator.layout import RunLayout
from remote_payload.wire.names import printable

MAX_TAIL_BYTES = 24 * 1024
_LOGS = (
    ("stderr.log", "Standard error"),
    ("stacks.log", "Stacks of all threads"),
    ("stdout.log", "Standard output"),
)


@dataclasses.dataclass(frozen=True)
class LogTail:
    """The last part of one log; `cut` when there is more before it."""

    name: str
    title: str
    text: str
    cut: bool


def log_tails(run: RunLayout) -> list[LogTail]:
    """The non-empty logs' ends, control and escape characters made visible."""
    tails = []
    for name, title in _LOGS:
        path = run.diagnostics / name
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MAX_TAIL_BYTES, 0))
            text = printable(file.read(MAX_TAIL_BYTES).decode("utf-8", "replace").replace("\r\n", "\n"))
        if text.strip():
            tails.append(LogTail(name, title, text.strip("\n"), size > MAX_TAIL_BYTES))
    return tails
