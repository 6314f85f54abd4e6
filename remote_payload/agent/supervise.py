"""The supervisor: decides, runs an attempt's jobs one after another, and writes what became of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import time
from collections.abc import Mapping
from typing import Optional

from remote_payload.agent import attempts, environment, files, gpus, machine
from remote_payload.agent.failure import AgentError
from remote_payload.agent.job_run import JobRun, Recorder
from remote_payload.agent.manifest import Inventory, take_inventory
from remote_payload.agent.record import EventLog, OutputLog, TruthFile
from remote_payload.agent.unchanged import Unchanged
from remote_payload.jobs.rest import Rest, RestNeverCameError
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import AttemptLayout, attempt_at
from remote_payload.wire.names import printable
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.run_messages import Manifest
from remote_payload.wire.states import AttemptState, AttemptStatus, Decision, JobState, JobStatus

_MANIFEST_TRIES = 5
_MAX_LISTED = 50
_WHILE_IT_ARRIVES = gpus.GpuChoice("", reason="what is still arriving is read on the CPU")


def supervise(folder: str, nonce: str) -> int:
    """Detach, and run the attempt if we are the first to decide on it; otherwise end without a trace."""
    layout, run_id, number = attempt_at(folder)
    attempt = layout.attempt(run_id, number)
    attempts.require_claim(attempt, nonce)
    if os.fork() > 0:
        os._exit(0)
    signals = StopSignals()
    me = machine.identity(os.getpid())
    if me is None:
        raise AgentError("internal", "this process cannot be seen by itself")
    if not attempts.decide(attempt, Decision.STARTED, me):
        return 0
    status = AttemptStatus(run_id, number, nonce, AttemptState.RUNNING, me, {}, started_at=time.time())
    supervisor = Supervisor(attempt, TruthFile(attempt, status), signals)
    try:
        state, cause = supervisor.run(attempts.read_plan(layout, run_id))
    except Exception as error:
        supervisor.finish(AttemptState.FAILED, f"the supervisor broke: {type(error).__name__}: {error}")
        raise
    supervisor.finish(state, cause)
    return 0


class StopSignals:
    """Notes a signal that tells this process to end. A hang-up is ignored: the login session is over, not the run."""

    def __init__(self) -> None:
        self.received: Optional[int] = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Inherited by the jobs: asked for stacks before it can give any, a job is not killed by the question.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _note(self, number: int, _frame: object) -> None:
        self.received = number


class Supervisor:
    """Runs the jobs of one attempt whose decision is ours. The only writer of its truth file and event log."""

    def __init__(self, attempt: AttemptLayout, truth: TruthFile, signals: StopSignals) -> None:
        self._attempt = attempt
        self._truth = truth
        self._signals = signals
        self._truth.tick(time.monotonic(), at_once=True)
        self._events = EventLog(attempt.events)

    def run(self, plan: Optional[NodePlan]) -> tuple[AttemptState, Optional[str]]:
        """All jobs in turn, then the manifest. Returns what the attempt came to and why, for `finish`."""
        if plan is None:
            return AttemptState.FAILED, "the run has no plan"
        for spec in plan.jobs:
            self._truth.set_job(spec.name, state=JobState.PENDING)
        self._events.add("attempt_started", pid=os.getpid(), jobs=[spec.name for spec in plan.jobs])
        with contextlib.suppress(OSError):
            files.replace(self._attempt.environment, files.json_bytes(environment.recorded(os.environ)))
        with contextlib.suppress(OSError):
            os.nice(plan.niceness)
        leases = gpus.GpuLeases(attempt_at(self._attempt.folder)[0])
        refusal = self._run_jobs(plan, leases)
        leases.release()
        state, cause = self._conclusion() if not refusal else (AttemptState.FAILED, refusal)
        problem = self._write_manifest()
        if problem is not None and state is AttemptState.SUCCEEDED:
            state = AttemptState.FAILED
        return state, "; ".join(part for part in (cause, problem) if part) or None

    def finish(self, state: AttemptState, cause: Optional[str]) -> None:
        """The terminal record, behind everything else that there is to write."""
        said = printable(cause)[:2000] if cause else None
        self._events.add("attempt_ended", state=state.value, cause=said)
        self._events.close()
        self._truth.finish(dataclasses.replace(self._truth.status, state=state, cause=said, ended_at=time.time()))

    def _run_jobs(self, plan: NodePlan, leases: gpus.GpuLeases) -> str:
        """The jobs in turn. Returns why a needed GPU could not be had, or nothing.

        No GPU is leased for a job that only waits for bytes: one that reads them as they arrive gets the CPU, for any
        other GPUs are chosen when all have arrived.
        """
        recorder = Recorder(
            self._attempt,
            self._truth,
            self._events,
            OutputLog(self._attempt.stdout_log),
            OutputLog(self._attempt.stderr_log),
        )
        inherited = environment.for_job(os.environ)
        layout, _, _ = attempt_at(self._attempt.folder)
        checkpoint = Unchanged(layout, plan, lambda: self._truth.tick(time.monotonic()))
        held: Optional[gpus.GpuChoice] = None
        refusal = ""
        for spec in plan.jobs:
            if self._wants_stop():
                break
            problem = checkpoint.problem()
            if problem:
                self._fail(spec.name, problem)
                continue
            rest = Rest(plan.checkpoint_path, functools.partial(self._tell_waiting, spec.name))
            is_arriving = not spec.reads_weights_only and rest.is_awaited()
            if is_arriving:
                leases.release()
                held = None
            if is_arriving and spec.begins_without_rest(plan.settings):
                choice = self._told(_WHILE_IT_ARRIVES)
            elif is_arriving and not self._has_come(rest, spec.name):
                continue
            else:
                choice = held = held or self._told(gpus.choose(plan.gpu, _gpus_for(plan), leases, inherited))
                refusal = choice.refusal
            if refusal:
                break
            given = {} if choice.visible is None else {gpus.VISIBLE_VARIABLE: choice.visible}
            variables = {**inherited, **given}
            JobRun(
                spec, plan.overrun, recorder, variables, leases.descriptors, self._wants_stop, checkpoint.problem
            ).run()
        self._give_up_remaining(plan)
        for name, log in (("stdout.log", recorder.stdout), ("stderr.log", recorder.stderr)):
            log.close()
            if log.dropped_bytes:
                self._events.add("log_truncated", log=name, dropped_bytes=log.dropped_bytes)
        return refusal

    def _told(self, choice: gpus.GpuChoice) -> gpus.GpuChoice:
        self._events.add("gpus_chosen", indices=[gpu.index for gpu in choice.chosen], reason=choice.reason)
        return choice

    def _tell_waiting(self, job: str, _waited_s: int, words: str) -> None:
        self._truth.set_job(job, message=words)

    def _has_come(self, rest: Rest, job: str) -> bool:
        """Wait for the rest of the checkpoint, for a job that has not begun. False where it never came, which fails the
        job, or where stop was asked for."""
        try:
            while rest.await_more():
                self._truth.tick(time.monotonic())
                if self._wants_stop():
                    return False
        except RestNeverCameError as error:
            self._fail(job, printable(f"{type(error).__name__}: {error}"))
            return False
        return True

    def _fail(self, job: str, words: str) -> None:
        """For a job that has not begun."""
        self._truth.set_job(job, state=JobState.FAILED, error=words, ended_at=time.time())
        self._events.add("job_ended", job=job, state=JobState.FAILED.value, exit_status=None, error=words)

    def _give_up_remaining(self, plan: NodePlan) -> None:
        for spec in plan.jobs:
            if self._truth.status.jobs[spec.name].state is JobState.PENDING:
                self._truth.set_job(spec.name, state=JobState.NOT_RUN)

    def _wants_stop(self) -> bool:
        return self._signals.received is not None or os.path.exists(self._attempt.cancel_request)

    def _conclusion(self) -> tuple[AttemptState, Optional[str]]:
        jobs = self._truth.status.jobs
        received = self._signals.received
        cut_short = any(job.state in (JobState.CANCELLED, JobState.NOT_RUN) for job in jobs.values())
        if cut_short and received is not None:
            return AttemptState.FAILED, f"the supervisor was told to end by {signal.Signals(received).name}"
        return conclude(jobs)

    def _write_manifest(self) -> Optional[str]:
        """Write the manifest; the problem in a sentence if it cannot be."""

        def go_on() -> bool:
            self._truth.tick(time.monotonic())
            return self._signals.received is None or self._signals.received == before

        before = self._signals.received
        inventory = take_inventory(self._attempt, go_on)
        self._tell_left_out(inventory)
        if not go_on():
            return "the artifacts were not listed to their end"
        data = files.json_bytes(to_json(Manifest(inventory.entries, complete=True)))
        for left in reversed(range(_MANIFEST_TRIES)):
            try:
                files.replace(self._attempt.manifest, data)
            except OSError as error:
                self._truth.release_reserve()
                if not left:
                    return f"the manifest could not be written: {error.strerror}"
                self._truth.tick(time.monotonic())
                time.sleep(1.0)
            else:
                break
        return None

    def _tell_left_out(self, inventory: Inventory) -> None:
        if inventory.left_out:
            listed = [{"name": printable(name)[:200], "reason": why} for name, why in inventory.left_out[:_MAX_LISTED]]
            self._events.add("artifacts_left_out", count=len(inventory.left_out), first=listed)


def conclude(jobs: Mapping[str, JobStatus]) -> tuple[AttemptState, Optional[str]]:
    """What an attempt came to whose jobs all ended, and why: succeeded only if every job did."""
    failed = [f"job {name} failed: {job.error}" for name, job in jobs.items() if job.state is JobState.FAILED]
    if any(job.state in (JobState.CANCELLED, JobState.NOT_RUN) for job in jobs.values()):
        return AttemptState.CANCELLED, "; ".join(["cancelled on request", *failed])
    if not jobs:
        return AttemptState.FAILED, "the plan has no jobs"
    return (AttemptState.FAILED, "; ".join(failed)) if failed else (AttemptState.SUCCEEDED, None)


def _gpus_for(plan: NodePlan) -> tuple[gpus.GpuFacts, ...]:
    return () if plan.gpu.device == "cpu" else gpus.find_gpus()
