"""What people and programs see: text on stderr while working, the result on stdout, errors with their next action."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ExitCode, RemoteEvalError
from remote_payload.wire.names import printable

if TYPE_CHECKING:
    from orchestrator.layout import LocalLayout
    from orchestrator.ssh.settings import RetryNotice
    from orchestrator.transfer.progress import TransferProgress
    from remote_payload.wire.results import Finding
    from remote_payload.wire.states import AttemptStatus

_LOG_BYTES = 2 * 1024 * 1024
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


def human_bytes(count: float) -> str:
    """`1.4 GB`, with decimal units as disks and links have them."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop()
    return f"{count:.0f} {units[-1]}" if units[-1] == "B" or count >= 100 else f"{count:.1f} {units[-1]}"


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


class ConsoleReporter:
    """Tells a person on stderr what the pipeline does: one line an event, a live line for progress on a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = False
        self._last_progress_s = 0.0
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
        eta = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        done, total = human_bytes(progress.bytes_done), human_bytes(progress.bytes_total)
        text = f"  {what}: {done} of {total}, {human_bytes(progress.bytes_per_s)}/s{eta}"
        self._progress(text, is_last=progress.bytes_done >= progress.bytes_total)

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
                self._progress(f"  {name}: {phase} {job.counter} of {job.total} {job.message}", is_last=False)

    def _line(self, text: str) -> None:
        _log.info("%s", printable(text.strip()))
        if self._quiet:
            return
        if self._live:
            sys.stderr.write("\r\x1b[K")
            self._live = False
        print(printable(text), file=sys.stderr, flush=True)

    def _progress(self, text: str, *, is_last: bool) -> None:
        now = time.monotonic()
        if self._quiet or (not is_last and now - self._last_progress_s < (0.2 if self._is_terminal else 10.0)):
            return
        self._last_progress_s = now
        if not self._is_terminal:
            print(printable(text), file=sys.stderr, flush=True)
            return
        sys.stderr.write("\r\x1b[K" + printable(text).replace("\n", " ")[:200])
        sys.stderr.flush()
        self._live = True


def ask_on_terminal(text: str, echo: bool) -> str | None:
    """A `Prompt`: asks on the controlling terminal, None where there is none."""
    if not sys.stdin.isatty():
        return None
    import getpass

    try:
        return input(printable(text)) if echo else getpass.getpass(printable(text))
    except (EOFError, OSError):
        return None
