"""The outermost boundary: whatever a command ends in becomes an exit code, and no traceback reaches a person."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer

JOB_GOES_ON = "a job that was started goes on: `remote-eval resume` takes it up"


def finish(command: Callable[[], int], *, if_interrupted: str = JOB_GOES_ON) -> NoReturn:
    """Run a command and leave with its exit code. `if_interrupted`: what a person who ends it is told."""
    raise typer.Exit(_exit_code(command, if_interrupted))


def _exit_code(command: Callable[[], int], if_interrupted: str) -> int:
    # Imported here so that `--help`, which runs no command, answers as fast as a bare Typer app.
    from orchestrator.cli.output import report_bug, report_error, start_log
    from orchestrator.errors import ExitCode, RemoteEvalError
    from orchestrator.layout import LocalLayout

    layout = LocalLayout.for_user()
    start_log(layout)
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {if_interrupted}", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except RemoteEvalError as error:
        return report_error(error, as_json="--json" in sys.argv[1:])
    except BrokenPipeError:
        # Whoever read our output has left; there is nobody to tell.
        sys.stderr.close()
        return int(ExitCode.DONE)
    except Exception as error:  # noqa: BLE001 - the one place where an unforeseen error becomes a line and a code
        return report_bug(error, str(layout.data / "client.log"))
