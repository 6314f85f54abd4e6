"""What a job says on its pipe, and how long it may say nothing new. Pure: no clock and no file of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Optional

from remote_payload.wire.names import printable
from remote_payload.wire.states import Phase

MAX_LINE_BYTES = 64 * 1024
_MAX_TEXT = 500


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a job is, or with `error` the sentence in which it failed."""

    phase: Optional[Phase] = None
    counter: int = 0
    total: Optional[int] = None
    message: str = ""
    error: Optional[str] = None


def one_line(text: str, limit: int = _MAX_TEXT) -> str:
    """Text from a job as one harmless line of at most `limit` characters."""
    return printable(" ".join(text.split()))[:limit]


def parse_report(line: bytes) -> Optional[Report]:
    """The report in one line of the pipe, or None for what is none: a job may write garbage there."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("error"), str):
        return Report(error=one_line(value["error"]))
    try:
        phase = Phase(value.get("phase"))
    except ValueError:
        return None
    counter, total, message = value.get("counter", 0), value.get("total"), value.get("message", "")
    if not _is_count(counter) or not (total is None or _is_count(total)) or not isinstance(message, str):
        return None
    return Report(phase, counter, total, one_line(message))


class LineReader:
    """Cuts a byte stream into lines. A line over `max_line_bytes` is dropped whole, so memory stays bounded."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_line_bytes
        self._held = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        *whole, rest = data.split(b"\n")
        for part in whole:
            self._held += part
            if not self._skipping and len(self._held) <= self._max:
                yield bytes(self._held)
            self._held.clear()
            self._skipping = False
        self._held += rest
        if len(self._held) > self._max:
            self._held.clear()
            self._skipping = True


class PhaseClock:
    """Tells when a job has been in one (phase, counter) for longer than the phase's budget.

    `now` is always the caller's monotonic clock in seconds. A phase without a budget may take for ever.
    """

    def __init__(self, budgets_s: Mapping[str, float], now: float) -> None:
        self._budgets_s = budgets_s
        self._since = now
        self.phase = Phase.IMPORT
        self.counter = 0

    def observe(self, phase: Phase, counter: int, now: float) -> bool:
        """Note where the job is; True if that is new, which starts the budget anew."""
        if (phase, counter) == (self.phase, self.counter):
            return False
        self.phase, self.counter, self._since = phase, counter, now
        return True

    @property
    def budget_s(self) -> Optional[float]:
        return self._budgets_s.get(self.phase.value)

    def is_overdue(self, now: float) -> bool:
        return self.budget_s is not None and now - self._since > self.budget_s

    def grant_again(self, now: float) -> None:
        """Let the phase have its budget once more."""
        self._since = now


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
