"""follow: read the truth file and the event log until a terminal record is there. Lost contact is not failure."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

from orchestrator.errors import AttemptLostError, RemoteEvalError, UnreachableError
from orchestrator.journal import AttemptRecord
from orchestrator.pipeline.assess import Standing, assess
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.launch import read_status, status_request
from orchestrator.schedulers.base import scheduler_for
from remote_payload.wire.run_messages import StatusReply
from remote_payload.wire.states import AttemptState, AttemptStatus

FIRST_POLL_S = 0.3
LONGEST_POLL_S = 3.0
REREAD_S = 2.0
STALE_WARNING_S = 60.0
STALE_LIMIT_S = 1800.0
"""A supervisor that stood still this long on our clock is not waited for: the run is left to `resume`."""


@dataclasses.dataclass
class _Heartbeat:
    """Judges liveliness by change on our own monotonic clock, never by the node's."""

    value: tuple[int, ...] = ()
    changed_at: float = dataclasses.field(default_factory=time.monotonic)
    warned: bool = False

    def see(self, status: AttemptStatus | None) -> float:
        """Seconds since anything moved."""
        moving = (status.heartbeat, *(job.counter for job in status.jobs.values())) if status else ()
        if moving != self.value:
            self.value, self.changed_at, self.warned = moving, time.monotonic(), False
        return time.monotonic() - self.changed_at


def follow(context: RunContext, attempt: AttemptRecord) -> AttemptStatus:
    """Return the terminal record. Raises `AttemptLostError` only after two absences and a re-read, and
    `UnreachableError` when the node or the supervisor stays silent: the job goes on and can be resumed.
    """
    scheduler = scheduler_for(context.profile.scheduler)
    heartbeat = _Heartbeat()
    poll_s, absences, last = FIRST_POLL_S, 0, None
    while True:
        reply = read_status(context, attempt)
        standing = assess(reply, attempt.nonce, scheduler)
        if standing is Standing.TERMINAL and reply.status is not None:
            context.reporter.attempt(reply.status)
            context.note_entry("terminal", attempt=attempt.number, state=reply.status.state.value)
            return reply.status
        if reply.status is not None and reply.status != last:
            context.reporter.attempt(reply.status)
            last, poll_s = reply.status, FIRST_POLL_S
        absences = absences + 1 if standing in (Standing.ABSENT, Standing.NOT_CLAIMED, Standing.VOID) else 0
        if absences >= 3:
            context.note_entry("lost", attempt=attempt.number, standing=standing.value)
            raise lost_error(context.plan.run_id, standing)
        _refuse_silence(context, heartbeat, heartbeat.see(reply.status), standing)
        time.sleep(REREAD_S if absences else poll_s)
        poll_s = min(poll_s * 1.4, LONGEST_POLL_S)


class AttemptEndedError(Exception):
    """An attempt failed or was cancelled while its client did something for it."""


class Watch:
    """What an attempt does while its client does something else. A thread of its own reads it, for the time of the
    context; what cannot be read over the connection that is there is not shown."""

    def __init__(self, context: RunContext, attempt: AttemptRecord) -> None:
        self._context, self._attempt = context, attempt
        self._scheduler = scheduler_for(context.profile.scheduler)
        self._is_over = threading.Event()
        self._read: tuple[Standing, AttemptStatus] | None = None
        self._shown: AttemptStatus | None = None

    def show(self) -> None:
        """Tell the reporter what is new. Raises `AttemptEndedError` once the attempt did not succeed."""
        read = self._read
        if read is None or read[1] == self._shown:
            return
        standing, self._shown = read
        self._context.reporter.attempt(self._shown)
        if standing is Standing.TERMINAL and self._shown.state is not AttemptState.SUCCEEDED:
            raise AttemptEndedError

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()

    def _look_on(self) -> None:
        poll_s = FIRST_POLL_S
        while not self._is_over.wait(poll_s):
            with contextlib.suppress(RemoteEvalError):
                request = status_request(self._context, self._attempt)
                reply = self._context.node.call_if_connected("status", request, StatusReply)
                if reply is not None and reply.status is not None:
                    standing = assess(reply, self._attempt.nonce, self._scheduler)
                    if standing is not Standing.FOREIGN:
                        self._read = standing, reply.status
            poll_s = min(poll_s * 1.4, LONGEST_POLL_S)


def lost_error(run_id: str, standing: Standing) -> AttemptLostError:
    return AttemptLostError(
        f"the attempt is {standing.value}: its supervisor is gone without a terminal record "
        "(killed, out of memory, or the machine restarted)",
        action=f"`remote-eval resume {run_id} --retry` starts a new attempt; what it wrote so far is collected.",
    )


def _refuse_silence(context: RunContext, heartbeat: _Heartbeat, silent_s: float, standing: Standing) -> None:
    if silent_s > STALE_LIMIT_S:
        raise UnreachableError(
            f"nothing has moved on the node for {silent_s / 60:.0f} minutes ({standing.value})",
            action=f"The run is left as it is: `remote-eval status {context.plan.run_id}`, `resume`, or `cancel`.",
        )
    if silent_s > STALE_WARNING_S and not heartbeat.warned:
        heartbeat.warned = True
        context.reporter.warn(f"the supervisor has not moved for {silent_s:.0f} s ({standing.value}); still watching")
