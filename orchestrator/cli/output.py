"""What people and programs see: text on stderr while working, the result on stdout, errors with their next action."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ExitCode, RemoteEvalError
from remote_payload.wire.names import printable
from remote_payload.wire.units import human_bytes

if TYPE_CHECKING:
    from orchestrator.layout import LocalLayout
    from orchestrator.ssh.settings import RetryNotice
    from orchestrator.transfer.progress import TransferProgress
    from remote_payload.wire.results import Finding
    from remote_payload.wire.states import AttemptStatus, JobStatus

_LOG_BYTES = 2 * 1024 * 1024
_EVENT_INTERVAL_S = 1.0
_log = logging.getLogger("remote_eval")


def start_log(layout: LocalLayout) -> None:
    """Send our log to a private, bounded file; a folder that cannot be written costs the log, not the command."""
    try:
        layout.make_private(layout.data)
        handler = logging.handlers.RotatingFileHandler(layout.data / "client.log", maxBytes=_LOG_BYTES, backupCount=2)
    except OSError as error:
        print(f"no log file: {error}", file=sys.stderr)
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2, sort_keys=True, ensure_ascii=True)
    sys.stdout.write("\n")


def error_document(error: RemoteEvalError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "cause": printable(str(error)),
        "owner": error.owner.value,
        "action": printable(error.action),
        "details": printable(error.details),
        "exit_code": int(error.exit_code),
    }


def report_error(error: RemoteEvalError, *, as_json: bool) -> int:
    """Show an error and return its exit code. The log has the traceback."""
    _log.error("%s", "".join(traceback.format_exception(error)))
    if as_json:
        print_json(error_document(error))
    lines = [f"error ({error.owner.value}): {printable(str(error))}"]
    if error.details:
        lines += [f"  | {line}" for line in printable(error.details).splitlines()[-30:]]
    if error.action:
        lines.append(f"next: {printable(error.action)}")
    print("\n".join(lines), file=sys.stderr)
    return int(error.exit_code)


def report_bug(error: BaseException, log_hint: str) -> int:
    """Our own mistake: one line for the person, the traceback for the log."""
    _log.error("%s", "".join(traceback.format_exception(error)))
    text = printable(f"{type(error).__name__}: {error}")[:500]
    print(f"error (us): an unexpected {text}\nnext: the log has the details: {log_hint}", file=sys.stderr)
    return int(ExitCode.INTERNAL)


def transfer_line(what: str, progress: TransferProgress) -> str:
    """Bytes, rate, streams, time left, and what needed no sending and why, for a person."""
    done, total = human_bytes(progress.bytes_done), human_bytes(progress.bytes_total)
    parts = [f"{done} of {total}", f"{human_bytes(progress.bytes_per_s)}/s"]
    if progress.streams > 1:
        parts.append(f"{progress.streams} streams")
    if progress.eta_s is not None and progress.bytes_done < progress.bytes_total:
        parts.append(f"{progress.eta_s:.0f} s left")
    saved = (
        (progress.bytes_saved - progress.bytes_reused, "was there already"),
        (progress.bytes_reused, "reused"),
        (progress.bytes_packed, "saved by packing"),
    )
    parts += [f"{human_bytes(count)} {why}" for count, why in saved if count]
    return f"{what}: {', '.join(parts)}"


def transfer_event(what: str, progress: TransferProgress) -> dict[str, Any]:
    """The same for a program; documented in docs/architecture.md."""
    return {
        "event": "transfer",
        "what": printable(what),
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "bytes_per_s": round(progress.bytes_per_s),
        "eta_s": round(progress.eta_s, 1) if progress.eta_s is not None else None,
        "streams": progress.streams,
        "saved": {
            "already_there": progress.bytes_saved - progress.bytes_reused,
            "reused": progress.bytes_reused,
            "packed": progress.bytes_packed,
        },
    }


def job_event(name: str, job: JobStatus) -> dict[str, Any]:
    """Where a job is, for a program; documented in docs/architecture.md."""
    return {
        "event": "job",
        "job": printable(name),
        "state": job.state.value,
        "phase": job.phase.value if job.phase else None,
        "error": printable(job.error) if job.error else None,
    }


class Pace:
    """Lets through what is told of each thing at most once every `interval_s`, and its end at once and only once."""

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._told: dict[str, tuple[float, bool]] = {}

    def allows(self, what: str, *, is_last: bool) -> bool:
        now = self._clock()
        told_s, was_last = self._told.get(what, (float("-inf"), False))
        if (is_last and was_last) or (not is_last and now - told_s < self._interval_s):
            return False
        self._told[what] = (now, is_last)
        return True


class ConsoleReporter:
    """Tells a person on stderr what the pipeline does: one line an event, a live line for progress on a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = False
        self._pace = Pace(0.2 if self._is_terminal else 10.0)
        self._shown: dict[str, tuple[Any, ...]] = {}

    def stage(self, name: str) -> None:
        self._line(f"{name}")

    def note(self, text: str) -> None:
        self._line(f"  {text}")

    def warn(self, text: str) -> None:
        self._line(f"  warning: {text}")

    def finding(self, finding: Finding) -> None:
        where = f" [{', '.join(finding.where[:3])}]" if finding.where else ""
        self._line(f"  {finding.severity.value}: {finding.id}: {finding.title}{where}")

    def retry(self, notice: RetryNotice) -> None:
        self._line(
            f"  {notice.reason}; try {notice.attempt + 1} in {notice.wait_s:.0f} s"
            f" (giving up in {notice.patience_left_s:.0f} s)"
        )

    def transfer(self, what: str, progress: TransferProgress) -> None:
        is_last = progress.bytes_done >= progress.bytes_total
        self._progress(what, f"  {transfer_line(what, progress)}", is_last=is_last)

    def attempt(self, status: AttemptStatus) -> None:
        for name, job in status.jobs.items():
            phase = job.phase.value if job.phase else ""
            seen = (job.state, phase, job.overran, job.error)
            if self._shown.get(name) != seen:
                self._shown[name] = seen
                extra = f", {job.error}" if job.error else ""
                overran = f" (overran: {', '.join(job.overran)})" if job.overran else ""
                self._line(f"  {name}: {job.state.value}{f', {phase}' if phase else ''}{extra}{overran}")
            elif job.state.value == "running" and job.total:
                self._progress(name, f"  {name}: {phase} {job.counter} of {job.total} {job.message}", is_last=False)

    def _line(self, text: str) -> None:
        _log.info("%s", printable(text.strip()))
        if self._quiet:
            return
        if self._live:
            sys.stderr.write("\r\x1b[K")
            self._live = False
        print(printable(text), file=sys.stderr, flush=True)

    def _progress(self, what: str, text: str, *, is_last: bool) -> None:
        if self._quiet or not self._pace.allows(what, is_last=is_last):
            return
        if not self._is_terminal:
            print(printable(text), file=sys.stderr, flush=True)
            return
        # A line that wraps is not taken back by the next one.
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r\x1b[K" + printable(text).replace("\n", " ")[:width])
        sys.stderr.flush()
        self._live = True


class JsonReporter(ConsoleReporter):
    """For programs: nothing but JSON objects on stderr, one a line: at most one a second while bytes travel, and one
    for each step of a job."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._pace = Pace(_EVENT_INTERVAL_S)
        self._told: dict[str, dict[str, Any]] = {}

    def attempt(self, status: AttemptStatus) -> None:
        super().attempt(status)
        for name, job in status.jobs.items():
            event = job_event(name, job)
            if self._told.get(name) != event:
                self._told[name] = event
                print(json.dumps(event, sort_keys=True), file=sys.stderr, flush=True)

    def transfer(self, what: str, progress: TransferProgress) -> None:
        if self._pace.allows(what, is_last=progress.bytes_done >= progress.bytes_total):
            print(json.dumps(transfer_event(what, progress), sort_keys=True), file=sys.stderr, flush=True)


def ask_on_terminal(text: str, echo: bool) -> str | None:
    """A `Prompt`: asks on the controlling terminal, None where there is none."""
    if not sys.stdin.isatty():
        return None
    import getpass

    try:
        return input(printable(text)) if echo else getpass.getpass(printable(text))
    except (EOFError, OSError):
        return None
