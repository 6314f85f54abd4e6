"""Runs one job of an attempt: `job <name> --attempt <folder>`. Started by the supervisor; may be run by hand."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Optional


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 if the job ran to its end, whatever its verdict; 1 with a traceback on stderr if it did not."""
    os.umask(0o077)
    parser = argparse.ArgumentParser(prog="payload job")
    parser.add_argument("name")
    parser.add_argument("--attempt", required=True, help="the attempt's folder")
    options = parser.parse_args(list(arguments))
    folder = os.path.abspath(options.attempt)
    _dump_stacks_when_asked(folder)
    from remote_payload.jobs.context import LIFELINE_FD_VARIABLE, PROGRESS_FD_VARIABLE

    progress = _take_inherited(PROGRESS_FD_VARIABLE)
    try:
        _run(options.name, folder, progress, _take_inherited(LIFELINE_FD_VARIABLE))
    except Exception as error:  # noqa: BLE001 - the outermost boundary: whatever a job raises is its failure
        traceback.print_exc()
        _tell_supervisor(progress, f"{type(error).__name__}: {error}")
        return 1
    return 0


def _dump_stacks_when_asked(folder: str) -> None:
    """Before anything that may hang."""
    from remote_payload.jobs import stacks
    from remote_payload.wire.layout import AttemptLayout

    stacks.dump_when_asked(AttemptLayout(folder).stacks_log)


def _run(name: str, folder: str, progress: Optional[int], lifeline: Optional[int]) -> None:
    from remote_payload.jobs import resolve
    from remote_payload.jobs.context import JobContext
    from remote_payload.jobs.documents import user_document
    from remote_payload.jobs.lifeline import hold
    from remote_payload.wire.codec import from_json
    from remote_payload.wire.layout import attempt_at
    from remote_payload.wire.plan import NodePlan
    from remote_payload.wire.states import Phase

    if lifeline is not None:
        hold(lifeline)
    layout, run_id, number = attempt_at(folder)
    plan = from_json(NodePlan, json.loads(Path(layout.plan(run_id)).read_bytes()))
    spec = resolve.find_spec(plan, name)
    artifacts = Path(layout.attempt(run_id, number).job_artifacts(name))
    artifacts.mkdir(parents=True, exist_ok=True)
    scratch, *earlier = (Path(layout.attempt(run_id, n).job_scratch(name)) for n in range(number, 0, -1))
    context = JobContext(plan, name, artifacts, progress, scratch, earlier)
    context.progress(Phase.IMPORT)
    resolve.add_shipped_code(layout, plan, spec)
    returned = resolve.find_function(spec)(context)
    if isinstance(returned, dict) and spec.entry != "builtin":
        context.write_results(user_document(name, returned))
    shutil.rmtree(scratch, ignore_errors=True)


def _tell_supervisor(progress: Optional[int], sentence: str) -> None:
    if progress is not None:
        with contextlib.suppress(OSError):
            # The newline in front closes a line that the job itself left open.
            os.write(progress, b"\n" + json.dumps({"error": sentence[:500]}).encode() + b"\n")


def _take_inherited(variable: str) -> Optional[int]:
    """The open descriptor that the supervisor named, or None when run by hand. What the job starts never sees it."""
    value = os.environ.pop(variable, "")
    if not value.isdigit():
        return None
    try:
        os.fstat(int(value))
    except OSError:
        return None
    return int(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
