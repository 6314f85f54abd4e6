"""The one object a job is called with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from remote_payload.wire import names
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.states import Phase

PROGRESS_FD_VARIABLE = "REMOTE_EVAL_PROGRESS_FD"
LIFELINE_FD_VARIABLE = "REMOTE_EVAL_LIFELINE_FD"
"""A pipe that ends when the supervisor does: a job without one would hold its GPU for nobody."""


class JobContext:
    """The plan, the job's own artifact folder, and a way to report progress.

    Progress goes to the supervisor through a pipe where there is one; run by hand, `progress` does nothing. A
    supervisor that has gone away is not the job's failure: a broken pipe is ignored from then on.

    `scratch` is for what a later attempt may go on from, None by hand; `earlier_scratch` are those of earlier attempts.
    """

    def __init__(
        self,
        plan: NodePlan,
        job: str,
        artifacts: Path,
        progress_fd: Optional[int] = None,
        scratch: Optional[Path] = None,
        earlier_scratch: Sequence[Path] = (),
    ) -> None:
        self.plan = plan
        self.job = names.check_job_name(job)
        self.artifacts = artifacts
        self.scratch = scratch
        self.earlier_scratch = tuple(earlier_scratch)
        self._progress_fd = progress_fd

    def progress(self, phase: Phase, counter: int = 0, total: Optional[int] = None, message: str = "") -> None:
        """Say where the job is. A phase's budget starts anew whenever phase or counter changes."""
        if self._progress_fd is None:
            return
        event = {"phase": phase.value, "counter": counter, "total": total, "message": message[:500]}
        try:
            os.write(self._progress_fd, json.dumps(event).encode() + b"\n")
        except OSError:
            self._progress_fd = None

    def write_results(self, document: dict[str, Any]) -> Path:
        """Write the job's document `<job>.json` atomically. NaN and Infinity are refused: they are no JSON."""
        return self.write_text(
            f"{self.job}.json", json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        )

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write one artifact `artifacts/<job>/<name>` atomically; `name` may hold slashes."""
        path = self.artifacts.joinpath(*names.check_artifact_path(name).split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return path
