"""One job from its start to its end: output, progress, budgets, stacks, stopping."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Callable, Optional

from remote_payload.agent import machine, own_code
from remote_payload.agent.child import Child, describe_exit, last_line
from remote_payload.agent.environment import snapshot
from remote_payload.agent.progress import LineReader, PhaseClock, Report, parse_report
from remote_payload.agent.record import AppendOnly, EventLog, OutputLog, TruthFile
from remote_payload.wire.layout import AttemptLayout
from remote_payload.wire.plan import JobSpec, OverrunPolicy
from remote_payload.wire.states import JobState, Phase

_TICK_S = 0.25
_PROGRESS_EVENT_S = 1.0
_STACKS_WAIT_S = 5.0
_STACKS_SETTLED_S = 0.3
_MAX_DUMPS = 20


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Where a job's doings are written down."""

    attempt: AttemptLayout
    truth: TruthFile
    events: EventLog
    stdout: OutputLog
    stderr: OutputLog


class JobRun:
    """Runs one job to its end. `wants_stop` is asked several times a second; True stops the job as cancelled. `problem`
    is asked of a job that ended well: in words, why it counts as failed all the same."""

    def __init__(
        self,
        spec: JobSpec,
        policy: OverrunPolicy,
        recorder: Recorder,
        environment: Mapping[str, str],
        keep_open: Sequence[int],
        wants_stop: Callable[[], bool],
        problem: Callable[[], str],
    ) -> None:
        self._name = spec.name
        self._policy = policy
        self._to = recorder
        self._environment = environment
        self._keep_open = keep_open
        self._wants_stop = wants_stop
        self._problem = problem
        self._clock = PhaseClock(policy.budgets_s, time.monotonic())
        self._lines = LineReader()
        self._reported_error: Optional[str] = None
        self._untold: Optional[Report] = None
        self._event_written_at = 0.0
        self._dumps = 0

    def run(self) -> JobState:
        """Start the job, see it through, and return what it came to; the truth file has it too."""
        folder = self._to.attempt.job_artifacts(self._name)
        self._to.stderr.tail = b""
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            child = Child(
                [*own_code.command(), "job", self._name, "--attempt", self._to.attempt.folder],
                environment=self._environment,
                folder=folder,
                stdout=self._to.stdout.write,
                stderr=self._to.stderr.write,
                progress=self._take_progress,
                keep_open=self._keep_open,
            )
        except OSError as error:
            return self._end(JobState.FAILED, None, f"the job cannot be started: {error}")
        process = machine.identity(child.pid)
        self._to.events.add("job_started", job=self._name, pid=child.pid)
        self._to.truth.set_job(
            self._name, state=JobState.RUNNING, phase=Phase.IMPORT, process=process, started_at=time.time()
        )
        self._to.truth.tick(time.monotonic(), at_once=True)
        stopped: Optional[tuple[JobState, str]] = None
        returncode: Optional[int] = None
        try:
            stopped = self._watch(child)
        finally:
            returncode = child.close()
        if stopped is not None:
            return self._end(stopped[0], returncode, stopped[1])
        if returncode == 0:
            problem = self._problem()
            return self._end(JobState.FAILED if problem else JobState.SUCCEEDED, 0, problem or None)
        words = self._reported_error or "; ".join(
            part for part in (describe_exit(returncode), last_line(self._to.stderr.tail)) if part
        )
        return self._end(JobState.FAILED, returncode, words)

    def _watch(self, child: Child) -> Optional[tuple[JobState, str]]:
        """Until the child ends by itself (None), or is stopped and why."""
        next_look = 0.0
        while not child.has_ended():
            child.pump(_TICK_S)
            now = time.monotonic()
            if now < next_look:
                continue
            next_look = now + _TICK_S / 2
            self._to.truth.tick(now)
            if now - self._event_written_at >= _PROGRESS_EVENT_S:
                self._tell_progress(now)
            if self._wants_stop():
                self._stop(child, "stop was asked for")
                return JobState.CANCELLED, "stopped on request"
            if self._clock.is_overdue(now):
                # After a pause of this very process, what the job said meanwhile is still in the pipe.
                child.pump(0)
                if self._clock.is_overdue(now):
                    error = self._overrun(child)
                    if error is not None:
                        return JobState.FAILED, error
        return None

    def _overrun(self, child: Child) -> Optional[str]:
        """Explain the hang, then go on (None) or stop the job and say why."""
        phase, budget_s = self._clock.phase, self._clock.budget_s
        overran = self._to.truth.status.jobs[self._name].overran
        if phase.value not in overran:
            self._to.truth.set_job(self._name, overran=(*overran, phase.value))
        heading = f"job {self._name}, phase {phase.value}, {budget_s} s without progress"
        self._to.events.add(
            "overran",
            job=self._name,
            phase=phase.value,
            counter=self._clock.counter,
            budget_s=budget_s,
            action=self._policy.action,
            stacks_bytes=self._dump_stacks(child, heading),
            environment=snapshot(child.pid),
        )
        if self._policy.action == "continue":
            self._clock.grant_again(time.monotonic())
            return None
        self._stop(child, "no progress")
        return f"no progress in phase {phase.value} for {budget_s:g} s; stacks.log shows where each thread was"

    def _dump_stacks(self, child: Child, heading: str) -> int:
        """Ask the job for its stacks; how many bytes came. None come from a process that is stuck in the kernel."""
        if self._dumps >= _MAX_DUMPS:
            return 0
        self._dumps += 1
        path = self._to.attempt.stacks_log
        stacks = AppendOnly(path)
        stacks.write(f"=== {heading} ===\n".encode())
        stacks.sync_and_close()
        before = size = _size(path)
        child.signal_child(signal.SIGUSR1)
        deadline = time.monotonic() + _STACKS_WAIT_S
        settled_at = deadline
        while time.monotonic() < min(deadline, settled_at) and not child.has_ended():
            child.pump(0.05)
            now_size = _size(path)
            if now_size != size:
                size, settled_at = now_size, time.monotonic() + _STACKS_SETTLED_S
        return size - before

    def _stop(self, child: Child, reason: str) -> None:
        self._to.events.add("stopping", job=self._name, reason=reason, grace_s=self._policy.cancel_grace_s)
        self._to.truth.tick(time.monotonic(), at_once=True)
        child.stop(self._policy.cancel_grace_s)

    def _take_progress(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            report = parse_report(line)
            if report is not None:
                self._note(report)

    def _note(self, report: Report) -> None:
        if report.error is not None:
            self._reported_error = report.error
            return
        phase = report.phase or self._clock.phase
        now = time.monotonic()
        is_new_phase = phase is not self._clock.phase
        is_new = self._clock.observe(phase, report.counter, now)
        self._to.truth.set_job(
            self._name, phase=phase, counter=report.counter, total=report.total, message=report.message
        )
        if is_new:
            self._untold = report
        if is_new_phase or now - self._event_written_at >= _PROGRESS_EVENT_S:
            self._tell_progress(now)

    def _tell_progress(self, now: float) -> None:
        """Write the latest progress as an event, unless it stands there already."""
        if self._untold is None:
            return
        report, self._untold = self._untold, None
        self._event_written_at = now
        self._to.events.add(
            "progress",
            job=self._name,
            phase=(report.phase or self._clock.phase).value,
            counter=report.counter,
            total=report.total,
            message=report.message,
        )

    def _end(self, state: JobState, returncode: Optional[int], error: Optional[str]) -> JobState:
        self._tell_progress(time.monotonic())
        exit_status = returncode if returncode is not None and returncode >= 0 else None
        ended_by = -returncode if returncode is not None and returncode < 0 else None
        self._to.truth.set_job(
            self._name, state=state, exit_status=exit_status, signal=ended_by, error=error, ended_at=time.time()
        )
        self._to.truth.tick(time.monotonic(), at_once=True)
        self._to.events.add("job_ended", job=self._name, state=state.value, exit_status=exit_status, error=error)
        return state


def _size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
