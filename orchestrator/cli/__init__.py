"""The command line. Thin: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import atexit
import gc


def main() -> None:
    """Entry point of `remote-eval`."""
    from orchestrator.cli.app import app

    leave_at_once()
    app(prog_name="remote-eval")


def leave_at_once() -> None:
    """At its end the process looks no more for cycles in what goes with it anyway: 50 ms once SSH was imported."""
    atexit.register(gc.freeze)
