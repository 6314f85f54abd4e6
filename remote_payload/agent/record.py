"""What the supervisor alone writes about its attempt: truth file, event log, bounded logs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from typing import Any, Callable, Optional

from remote_payload.agent import files
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import AttemptLayout
from remote_payload.wire.states import AttemptStatus, JobStatus

HEARTBEAT_S = 5.0
MAX_LOG_BYTES = 64 * 1024 * 1024
_MIN_INTERVAL_S = 0.5
_RESERVE_BYTES = 256 * 1024
_FINAL_TRIES = 60
_FINAL_WAIT_S = 1.0
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class TruthFile:
    """`status.json`, replaced whole and synced at each change that matters, and at least every `HEARTBEAT_S`.

    A full disk never stops the run: a change that cannot be written is written later, and the terminal record gives up
    a reserve of blocks to be written at all.
    """

    def __init__(self, attempt: AttemptLayout, status: AttemptStatus) -> None:
        self._attempt = attempt
        self.status = status
        self._written_at = 0.0
        self._is_stale = True
        with contextlib.suppress(OSError):
            files.write_new(attempt.reserve, b"\0" * _RESERVE_BYTES)

    def set_job(self, name: str, **changes: Any) -> None:
        """Change fields of one job's status; the file follows at the next `tick`."""
        job = dataclasses.replace(self.status.jobs.get(name, JobStatus()), **changes)
        self.status = dataclasses.replace(self.status, jobs={**self.status.jobs, name: job})
        self._is_stale = True

    def tick(self, now: float, at_once: bool = False) -> None:
        """Write if something changed a moment ago, or if the heartbeat is due. `now` is monotonic seconds."""
        age = now - self._written_at
        if at_once or age >= HEARTBEAT_S or (self._is_stale and age >= _MIN_INTERVAL_S):
            self.status = dataclasses.replace(self.status, heartbeat=self.status.heartbeat + 1)
            self._written_at = now
            with contextlib.suppress(OSError):
                self._write()

    def finish(self, status: AttemptStatus) -> None:
        """Write the terminal record, trying for about a minute. Raises `OSError` if the disk takes nothing."""
        self.status = dataclasses.replace(status, heartbeat=self.status.heartbeat + 1)
        for left in reversed(range(_FINAL_TRIES)):
            try:
                self._write()
                break
            except OSError:
                self.release_reserve()
                if not left:
                    raise
                time.sleep(_FINAL_WAIT_S if left < _FINAL_TRIES - 1 else 0.0)
        self.release_reserve()

    def _write(self) -> None:
        files.replace(self._attempt.status, files.json_bytes(to_json(self.status)))
        self._is_stale = False

    def release_reserve(self) -> None:
        """Give the reserved blocks back, once nothing but the last records is to be written."""
        with contextlib.suppress(OSError):
            os.unlink(self._attempt.reserve)


class AppendOnly:
    """A file that only grows, up to `max_bytes`; beyond, and on a full disk, what comes is dropped and counted."""

    def __init__(self, path: str, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._room = max_bytes
        self._descriptor: Optional[int] = None
        self.dropped_bytes = 0

    def write(self, data: bytes) -> bool:
        """Append as much of `data` as fits; True if that was all of it."""
        left = memoryview(data)
        try:
            descriptor = self._open()
            while left and self._room > 0:
                count = os.write(descriptor, left[: self._room])
                left = left[count:]
                self._room -= count
        except OSError:
            pass
        self.dropped_bytes += len(left)
        return not left

    def sync_and_close(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> int:
        """Opened at the first write that can: on a full disk not even an empty file may be had."""
        if self._descriptor is None:
            self._descriptor = os.open(self._path, _LOG_FLAGS, 0o600)
            self._room -= os.fstat(self._descriptor).st_size
        return self._descriptor


class EventLog:
    """`events.jsonl`: one object a line, `{"n": counter, "at": unix seconds, "event": name, …}`.

    Events: attempt_started, gpus_chosen, job_started, progress, overran, stopping, job_ended, log_truncated,
    artifacts_left_out, attempt_ended.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._file = AppendOnly(path)
        self._clock = clock
        self._count = 0
        self._last_is_whole = True

    def add(self, event: str, **fields: Any) -> None:
        """Append one event. A line that a full disk cut short is closed by the next one's newline."""
        self._count += 1
        line = json.dumps({"n": self._count, "at": round(self._clock(), 3), "event": event, **fields}).encode() + b"\n"
        self._last_is_whole = self._file.write(line if self._last_is_whole else b"\n" + line)

    def close(self) -> None:
        self._file.sync_and_close()


class OutputLog:
    """One of the jobs' output logs; `tail` is the end of what came since it was last emptied, dropped or not."""

    def __init__(self, path: str, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._file = AppendOnly(path, max_bytes)
        self._file.write(b"")
        self.tail = b""

    @property
    def dropped_bytes(self) -> int:
        return self._file.dropped_bytes

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.tail = (self.tail + data)[-4096:]

    def close(self) -> None:
        self._file.sync_and_close()
