"""Commands of the nightly watch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.output import print_json
from orchestrator.cli.session import services
from orchestrator.errors import ConfigurationError, ExitCode, UsageError
from orchestrator.layout import LocalLayout

if TYPE_CHECKING:
    from orchestrator.nightly import InstallPlan, Target, TargetOutcome
    from orchestrator.pipeline.context import Services
    from orchestrator.plan import RunPlan

_RECENT_RUNS = 100


def tick(file: Path | None, *, as_json: bool) -> int:
    """Visit every target; the exit code is the summary's."""
    from orchestrator import nightly

    layout = LocalLayout.for_user()
    world = services(as_json=as_json)
    path = file or layout.nightly_file
    if not path.exists():
        raise ConfigurationError(
            f"there is no {path}",
            action="Write one, such as `targets: [{name: best, cluster: tensor02, checkpoint: 'tensor02:best.pt'}]`.",
        )
    targets = nightly.load_targets(path).targets
    identities: dict[str, str] = {}

    def identity(target: Target) -> str:
        identities[target.name] = _identity(target, world)
        return identities[target.name]

    summary = nightly.tick(
        layout,
        targets,
        run_target=lambda target: _evaluate(target, identities[target.name], world),
        checkpoint_identity=identity,
    )
    if as_json:
        print_json(summary.to_json())
    else:
        print(summary.to_text(), end="")
    return summary.exit_code


def install(at: str, *, yes: bool, as_json: bool) -> int:
    from orchestrator import nightly

    layout = LocalLayout.for_user()
    command = nightly.nightly_command(layout)
    return _show_and_apply(nightly.plan_install(nightly.find_scheduler(), command, at), yes=yes, as_json=as_json)


def uninstall(*, yes: bool, as_json: bool) -> int:
    from orchestrator import nightly

    plan = nightly.plan_uninstall(nightly.find_scheduler())
    if plan is None:
        if as_json:
            print_json({"applied": False, "text": ""})
        else:
            print("nothing of ours is scheduled here")
        return int(ExitCode.DONE)
    return _show_and_apply(plan, yes=yes, as_json=as_json)


def _show_and_apply(plan: InstallPlan, *, yes: bool, as_json: bool) -> int:
    from orchestrator.nightly import apply_plan

    print(plan.text, file=sys.stderr if as_json else sys.stdout)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was changed: there is no terminal to ask on", action="Repeat with --yes.")
        if not typer.confirm("Do this?", default=False, err=True):
            print("nothing was changed", file=sys.stderr)
            return int(ExitCode.DONE)
    apply_plan(plan)
    if as_json:
        print_json({"applied": True, "scheduler": plan.scheduler, "text": plan.text})
    return int(ExitCode.DONE)


def _evaluate(target: Target, identity: str, world: Services) -> TargetOutcome:
    from orchestrator.history import row_from_results
    from orchestrator.nightly import TargetOutcome
    from orchestrator.pipeline.resolve import DEFAULT_NUM_SAMPLES, Request, resolve
    from orchestrator.pipeline.run import advance

    folder = Path(target.project or ".")
    config = folder / Path(target.config).expanduser() if target.config else None
    request = Request(
        target.cluster,
        _reference(target),
        config,
        DEFAULT_NUM_SAMPLES if target.num_samples is None else target.num_samples,
        target.jobs,
        start_folder=folder,
        nightly_target=target.name,
    )
    plan = _unfinished(target, identity, world) or resolve(request, world)
    outcome = advance(plan, world)
    if outcome is None:
        raise UsageError(f"{plan.run_id} was detached")
    report = world.layout.run(plan.run_id).report_html
    worse = tuple(str(item) for item in outcome.results.get("regressions", []))
    return TargetOutcome(plan.run_id, row_from_results(outcome.results).overall, worse, str(report))


def _reference(target: Target) -> str:
    """The target's checkpoint as a reference; a pattern here stands for the newest match."""
    from orchestrator.nightly import is_pattern, newest_match
    from orchestrator.plan import parse_reference

    folder = Path(target.project or ".")
    text = target.checkpoint
    if parse_reference(text, exists_here=(folder / Path(text).expanduser()).exists()).cluster is not None:
        if is_pattern(text):
            raise UsageError("a pattern names files here only", action="Name the node's checkpoint itself.")
        return text
    return str(newest_match(text, folder) if is_pattern(text) else folder / Path(text).expanduser())


def _identity(target: Target, world: Services) -> str:
    """What tells this content of the checkpoint from others: size, mtime and inode, here or on the node."""
    from orchestrator.payload import build_payload
    from orchestrator.pipeline.resolve import fingerprint, resolve_profile, resolve_reference
    from orchestrator.plan import node_path
    from orchestrator.project import find_project
    from remote_payload.wire.messages import Located, LocateRequest

    project = find_project(Path(target.project or "."))
    reference = resolve_reference(_reference(target))
    if reference.cluster is None:
        return _identity_text(reference.path, fingerprint(Path(reference.path)))
    named = resolve_profile(reference.cluster, project, world.layout)
    with world.open_node(named.profile, build_payload(world.layout)) as node:
        path = node_path(reference, named.profile.checkpoint_roots)
        found = node.call("locate", LocateRequest(node.root, path=path), Located)
    if not found.found:
        raise UsageError(f"there is no file at {reference}", action="Check the target's checkpoint.")
    return _identity_text(str(found.path), (found.size, found.mtime_ns, found.inode))


def _identity_text(path: str, fingerprint: tuple[int | None, ...]) -> str:
    return ":".join([path, *map(str, fingerprint)])


def _unfinished(target: Target, identity: str, world: Services) -> RunPlan | None:
    """A run of this target on this content that an earlier tick could not see to its end: its job may well be done."""
    from orchestrator.journal import fold
    from orchestrator.pipeline.run import load_plan

    for run_id in world.journal.run_ids()[:_RECENT_RUNS]:
        record = fold(world.journal.entries(run_id))
        attempt = record.current_attempt
        if record.reported or attempt is None or attempt.fate not in ("intended", "launched", "terminal"):
            continue
        plan = load_plan(run_id, world.layout)
        synced = record.synced or {}
        local = _identity_text(plan.checkpoint.path, plan.local_fingerprint)
        there = _identity_text(str(synced.get("path")), tuple(synced.get("fingerprint", ())))
        source = _identity_text(str(synced.get("source_path")), tuple(synced.get("source_fingerprint", ())))
        if plan.nightly_target == target.name and identity in (local, there, source):
            return plan
    return None
