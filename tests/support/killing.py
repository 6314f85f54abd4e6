"""Run the command line and die by SIGKILL at the n-th journal entry, just before or just after it is on the disk.

    python -m tests.support.killing before|after N -- ARGUMENTS

The journal brackets everything that the client does, so these are the instants at which a crash could lose or double
work.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from orchestrator.cli import main as command_line
from orchestrator.journal import Journal


def main() -> None:
    when, number, separator, *arguments = sys.argv[1:]
    if when not in ("before", "after") or separator != "--":
        sys.exit(__doc__)
    fatal, append, written = int(number), Journal.append, 0

    def append_or_die(self: Journal, run_id: str, kind: str, **data: Any) -> None:
        nonlocal written
        written += 1
        if written == fatal and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, run_id, kind, **data)
        if written == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = append_or_die  # type: ignore[method-assign]
    sys.argv = ["remote-eval", *arguments]
    command_line()


if __name__ == "__main__":
    main()
