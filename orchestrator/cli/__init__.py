"""The command line. Thin: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations


def main() -> None:
    """Entry point of `remote-eval`."""
    from orchestrator.cli.app import app

    app(prog_name="remote-eval")
