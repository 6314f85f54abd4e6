"""Commands that work on one run."""

from __future__ import annotations

import base64
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.output import print_json
from orchestrator.cli.session import plan_of, services
from orchestrator.errors import ExitCode, RemoteEvalError, UsageError
from remote_payload.wire.names import printable

if TYPE_CHECKING:
    from orchestrator.pipeline.context import Services
    from orchestrator.pipeline.run import RunOutcome
    from orchestrator.plan import RunPlan

_FOLLOW_POLL_S = 1.0
_LOG_NAMES = ("stdout.log", "stderr.log")


def run(
    cluster: str | None,
    checkpoint: str | None,
    config: Path | None,
    num_samples: int,
    jobs: str | None,
    *,
    detach: bool,
    as_json: bool,
    bandwidth_limit_mbps: float | None,
) -> int:
    """Resolve a request and take the run to its end."""
    from orchestrator.pipeline.resolve import Request, resolve

    if checkpoint is None:
        raise UsageError("no checkpoint was named", action="Give --checkpoint PATH or --checkpoint CLUSTER:PATH.")
    world = services(as_json=as_json, bandwidth_limit_mbps=bandwidth_limit_mbps)
    world.reporter.stage("resolve")
    asked = [name.strip() for name in jobs.split(",") if name.strip()] if jobs is not None else None
    plan = resolve(
        Request(cluster, checkpoint, config, num_samples, asked, start_folder=Path.cwd()),
        world,
    )
    world.reporter.note(f"run {plan.run_id} on {plan.cluster}: {', '.join(job.name for job in plan.jobs)}")
    return take_to_end(plan, world, detach=detach, retry=False, as_json=as_json)


def resume(run_id: str | None, *, retry: bool, detach: bool, as_json: bool, bandwidth_limit_mbps: float | None) -> int:
    world = services(as_json=as_json, bandwidth_limit_mbps=bandwidth_limit_mbps)
    return take_to_end(plan_of(run_id), world, detach=detach, retry=retry, as_json=as_json)


def take_to_end(plan: RunPlan, world: Services, *, detach: bool, retry: bool, as_json: bool) -> int:
    """Advance a run and print what it came to."""
    from orchestrator.pipeline.run import advance

    try:
        outcome = advance(plan, world, detach=detach, retry=retry)
    except RemoteEvalError:
        if not as_json:
            _print_report_place(plan, world)
        raise
    if outcome is None:
        if as_json:
            print_json({"run_id": plan.run_id, "state": "detached"})
        else:
            print(f"{plan.run_id} is under way; `remote-eval resume {plan.run_id}` brings its report")
        return int(ExitCode.DONE)
    return show_outcome(outcome, world, as_json=as_json)


def show_outcome(outcome: RunOutcome, world: Services, *, as_json: bool) -> int:
    """Print the verdict and where the report is; the exit code follows the verdict."""
    from orchestrator.report import verdict_sentence

    run = world.layout.run(outcome.plan.run_id)
    verdict = outcome.results["verdict"]
    failed = verdict["overall"] == "fail" or bool(outcome.results.get("regressions"))
    code = int(ExitCode.VERDICT_FAIL if failed else ExitCode.DONE)
    if as_json:
        print_json(
            {
                "run_id": outcome.plan.run_id,
                "verdict": verdict,
                "report": str(run.report_html),
                "results": str(run.results),
                "exit_code": code,
            }
        )
        return code
    print(printable(verdict_sentence(outcome.results)))
    for name, value in verdict["dimensions"].items():
        reason = verdict.get("reasons", {}).get(name, "")
        print(printable(f"  {name.replace('_', ' '):18} {value.replace('_', ' '):13} {reason}"))
    print(f"report: {run.report_html}")
    return code


def status(run_id: str | None, *, as_json: bool) -> int:
    """Print the journal's view and one reading of the node."""
    from orchestrator.journal import fold
    from orchestrator.pipeline.run import read_node_status
    from remote_payload.wire.codec import to_json

    plan = plan_of(run_id)
    world = services(quiet=True)
    record = fold(world.journal.entries(plan.run_id))
    current = record.current_attempt
    document: dict[str, Any] = {
        "run_id": plan.run_id,
        "cluster": plan.cluster,
        "checkpoint": str(plan.checkpoint),
        "stage_seconds": record.stage_seconds,
        "attempt": to_json(current),
        "collected": record.collected,
        "reported": record.reported,
        "last_error": record.last_error,
        "node": None,
    }
    if current is not None and current.fate in ("intended", "launched"):
        reply = read_node_status(plan, world)
        document["node"] = to_json(dataclasses.replace(reply, tails={})) if reply is not None else None
    if as_json:
        print_json(document)
        return int(ExitCode.DONE)
    print(f"{plan.run_id}  {plan.checkpoint} on {plan.cluster}")
    print(printable(f"  {_standing(document)}"))
    node_status = (document["node"] or {}).get("status") or {}
    for name, job in node_status.get("jobs", {}).items():
        counter = f" {job['counter']} of {job['total']}" if job["total"] else ""
        print(printable(f"  {name}: {job['state']} {job['phase'] or ''}{counter} {job['message']}".rstrip()))
    if record.last_error:
        print(printable(f"  last stop: {record.last_error['cause']}\n  next: {record.last_error['action']}"))
    return int(ExitCode.DONE)


def _standing(document: dict[str, Any]) -> str:
    attempt, node = document["attempt"], document["node"]
    if attempt is None:
        return "not launched yet"
    if attempt["fate"] in ("terminal", "lost", "void"):
        return f"attempt {attempt['number']}: {attempt['state'] or attempt['fate']}" + (
            ", report written" if document["reported"] else ", not collected yet"
        )
    if node is None or node["status"] is None:
        return f"attempt {attempt['number']}: {attempt['fate']}, no status on the node yet"
    alive = {True: "its supervisor lives", False: "its supervisor is gone", None: "its supervisor is elsewhere"}
    return f"attempt {attempt['number']}: {node['status']['state']}, {alive[node['supervisor_alive']]}"


def logs(run_id: str | None, *, follow: bool, as_json: bool) -> int:
    """Print standard output and error of the job, from the node or from what was collected."""
    from orchestrator.journal import fold

    plan = plan_of(run_id)
    world = services(quiet=True)
    record = fold(world.journal.entries(plan.run_id))
    run = world.layout.run(plan.run_id)
    if record.collected is not None:
        texts = {n: (run.diagnostics / n).read_bytes() for n in _LOG_NAMES if (run.diagnostics / n).exists()}
        _show_logs(texts, as_json=as_json)
        return int(ExitCode.DONE)
    if record.current_attempt is None:
        raise UsageError(f"{plan.run_id} was not launched yet", action=f"remote-eval resume {plan.run_id}")
    return _node_logs(plan, world, follow=follow, as_json=as_json)


def _node_logs(plan: RunPlan, world: Services, *, follow: bool, as_json: bool) -> int:
    from orchestrator.pipeline.launch import read_status
    from orchestrator.pipeline.run import open_run

    context = open_run(plan, world)
    attempt = context.record().current_attempt
    if attempt is None:
        raise UsageError(f"{plan.run_id} has no attempt")
    offsets = dict.fromkeys(_LOG_NAMES, 0)
    gathered = dict.fromkeys(_LOG_NAMES, b"")
    with context:
        while True:
            reply = read_status(context, attempt, offsets)
            new = {name: base64.b64decode(text) for name, text in reply.tails.items() if name in offsets}
            for name, data in new.items():
                offsets[name] += len(data)
                gathered[name] += data if as_json else b""
            if not as_json:
                _show_logs(new, as_json=False)
            has_more = any(reply.sizes.get(name, 0) > offset for name, offset in offsets.items())
            has_ended = reply.status is not None and reply.status.state.is_terminal
            is_gone = has_ended or (follow and reply.supervisor_alive is False and reply.status is not None)
            if not has_more and (is_gone or not follow):
                break
            if not has_more:
                time.sleep(_FOLLOW_POLL_S)
    if as_json:
        _show_logs(gathered, as_json=True)
    return int(ExitCode.DONE)


def _show_logs(texts: dict[str, bytes], *, as_json: bool) -> None:
    """What the node wrote is data: escapes are shown, never obeyed."""
    if as_json:
        print_json({name: data.decode(errors="replace") for name, data in texts.items()})
        return
    for name in _LOG_NAMES:
        data = texts.get(name, b"")
        if data:
            stream = sys.stderr if name == "stderr.log" else sys.stdout
            stream.write(printable(data.decode(errors="replace")))
            stream.flush()


def cancel(run_id: str | None, *, as_json: bool) -> int:
    from orchestrator.pipeline import run as driver

    plan = plan_of(run_id)
    ended = driver.cancel(plan, services(as_json=as_json))
    state = ended.state.value if ended is not None else "not started"
    if as_json:
        print_json({"run_id": plan.run_id, "state": state})
    else:
        print(f"{plan.run_id}: {state}")
    return int(ExitCode.DONE)


def collect(run_id: str | None, *, as_json: bool) -> int:
    """Collect whatever the newest attempt has so far."""
    from orchestrator.pipeline.collect import collect as collect_now
    from orchestrator.pipeline.run import open_run

    plan = plan_of(run_id)
    context = open_run(plan, services(as_json=as_json))
    attempt = context.record().current_attempt
    if attempt is None:
        raise UsageError(f"{plan.run_id} was not launched yet", action=f"remote-eval resume {plan.run_id}")
    with context:
        manifest = collect_now(context, attempt, is_final=attempt.fate in ("terminal", "lost"))
    if as_json:
        print_json({"run_id": plan.run_id, "folder": str(context.run.folder), "complete": manifest.complete})
    else:
        print(f"{len(manifest.entries)} artifacts in {context.run.folder}")
    return int(ExitCode.DONE)


def report(run_id: str | None, *, as_json: bool) -> int:
    """Write the report again; needs no node."""
    from orchestrator.pipeline.reporting import report as report_now
    from orchestrator.pipeline.run import RunOutcome, open_run

    plan = plan_of(run_id)
    world = services(as_json=as_json)
    context = open_run(plan, world)
    if context.record().collected is None:
        raise UsageError(f"{plan.run_id} was not collected yet", action=f"remote-eval resume {plan.run_id}")
    return show_outcome(RunOutcome(plan, report_now(context)), world, as_json=as_json)


def _print_report_place(plan: RunPlan, world: Services) -> None:
    path = world.layout.run(plan.run_id).report_html
    if path.exists():
        print(f"report: {path}")
