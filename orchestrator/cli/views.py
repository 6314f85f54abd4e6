"""Commands that look: history, inspect, doctor, clusters, gc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.output import print_json
from orchestrator.cli.session import services
from orchestrator.errors import ExitCode
from orchestrator.layout import LocalLayout
from remote_payload.wire.names import printable
from remote_payload.wire.units import human_bytes

if TYPE_CHECKING:
    from orchestrator.doctor import Check
    from orchestrator.node import Node
    from orchestrator.pipeline.context import Services
    from orchestrator.profiles import NamedProfile

_GIB = 1024**3
_INSPECT_TIMEOUT_S = 60.0


def history(cluster: str | None, checkpoint: str | None, limit: int, *, rebuild: bool, as_json: bool) -> int:
    """List runs, newest first."""
    from orchestrator import history as past
    from remote_payload.wire.codec import to_json

    layout = LocalLayout.for_user()
    if rebuild:
        past.rebuild(layout)
    rows = past.list_runs(layout, cluster=cluster, checkpoint=checkpoint, limit=limit)
    if as_json:
        print_json([to_json(row) for row in rows])
        return int(ExitCode.DONE)
    if not rows:
        print("no run has a report yet")
    for row in rows:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in list(row.key_metrics.items())[:3])
        print(printable(f"{row.run_id}  {row.overall:13} {row.cluster:12} {row.checkpoint}  {metrics}"))
    return int(ExitCode.DONE)


def inspect(checkpoint: str, *, as_json: bool) -> int:
    """Header facts of a local file, or of one on a node."""
    from orchestrator.inspection import inspect_local, render_local
    from orchestrator.plan import local_checkpoint, node_path, parse_reference
    from remote_payload.wire.codec import to_json
    from remote_payload.wire.messages import InspectRequest

    exists_here = Path(checkpoint).expanduser().exists()
    reference = parse_reference(checkpoint, exists_here=exists_here)
    if reference.cluster is None:
        path = local_checkpoint(reference)
        if as_json:
            print_json(inspect_local(path))
        else:
            print(render_local(path), end="")
        return int(ExitCode.DONE)
    with _node(services(as_json=as_json), _profile(reference.cluster)) as node:
        path_there = node_path(reference, node.profile.checkpoint_roots)
        request = InspectRequest(path_there, node.root)
        found = node.call_json("inspect", to_json(request), timeout_s=_INSPECT_TIMEOUT_S)
    if as_json:
        print_json({"header": found.get("header"), "findings": found.get("findings")})
    else:
        print(printable(str(found.get("text", ""))), end="")
    return int(ExitCode.DONE)


_MARKS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


class CheckList:
    """Shows checks as they come, or all of them as JSON at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.failed: list[str] = []
        self._as_json = as_json
        self._checks: list[Check] = []

    def show(self, check: Check) -> None:
        self._checks.append(check)
        if check.state.value == "error":
            self.failed.append(check.name)
        if not self._as_json:
            print(printable(f"{_MARKS[check.state.value]}  {check.name}: {check.message}"), flush=True)
            if check.action and check.state.value != "ok":
                print(printable(f"         next: {check.action}"), flush=True)

    def finish(self) -> None:
        from remote_payload.wire.codec import to_json

        if self._as_json:
            print_json([to_json(check) for check in self._checks])


def doctor(cluster: str | None, *, as_json: bool) -> int:
    """Run the checks; the exit code is that of an unfit node where one fails."""
    from orchestrator.doctor import check_node, check_this_machine

    shown = CheckList(as_json=as_json)
    for check in check_this_machine(LocalLayout.for_user()):
        shown.show(check)
    profile = _profile(cluster, optional=True)
    if profile is not None:
        with _node(services(as_json=as_json), profile) as node:
            for check in check_node(node, profile.profile.gpu.device):
                shown.show(check)
    shown.finish()
    return int(ExitCode.NODE_UNFIT if shown.failed else ExitCode.DONE)


def clusters(*, as_json: bool) -> int:
    """List profiles; one that cannot be read is listed with what is wrong."""
    from orchestrator.errors import ConfigurationError
    from orchestrator.profiles import find_profiles, load_profile
    from orchestrator.project import find_project

    layout, project = LocalLayout.for_user(), find_project(Path.cwd())
    rows = []
    for name, path in sorted(find_profiles(layout, project.folder).items()):
        row = {"name": name, "file": str(path), "host": "", "description": "", "problem": ""}
        try:
            profile = load_profile(name, layout, project.folder).profile
            row["host"] = "loopback" if profile.embedded else str(profile.host)
            row["description"] = profile.description
        except ConfigurationError as error:
            row["problem"] = str(error)
        rows.append(row)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(printable(f"{row['name']:16} {row['host']:24} {row['problem'] or row['description']}"))
    return int(ExitCode.DONE)


def show_cluster(name: str, *, as_json: bool) -> int:
    import yaml

    named = _profile(name)
    document = named.profile.model_dump(mode="json", by_alias=True)
    if as_json:
        print_json({"name": named.name, "file": named.source, "profile": document})
    else:
        print(f"# {named.source}\n{yaml.safe_dump(document, sort_keys=False)}", end="")
    return int(ExitCode.DONE)


def gc(cluster: str | None, keep_days: float | None, keep_gib: float | None, *, delete: bool, as_json: bool) -> int:
    """Say, or with `delete` do, what may go from our folder on a node."""
    from orchestrator.pipeline.room import gc_request
    from remote_payload.wire.codec import to_json
    from remote_payload.wire.messages import GcReport

    world = services(as_json=as_json)
    keep_bytes = int(keep_gib * _GIB) if keep_gib is not None else None
    with _node(world, _profile(cluster)) as node:
        request = gc_request(node, world.journal, keep_days=keep_days, keep_bytes=keep_bytes, delete=delete)
        report = node.call("gc", request, GcReport)
    if as_json:
        print_json(to_json(report) | {"dry_run": not delete})
        return int(ExitCode.DONE)
    for item in report.deleted:
        print(printable(f"{human_bytes(item.size):>8}  {item.path}"))
    for kept in report.pinned:
        print(printable(f"{human_bytes(kept.size):>8}  {kept.path} stays: {', '.join(kept.by)} needs it"))
    verb = "freed" if delete else "would free (with --delete)"
    print(f"{verb} {human_bytes(report.freed_bytes)}; the store holds {human_bytes(report.store_bytes)}", end="")
    print(f" of at most {human_bytes(request.keep_bytes)}" if request.keep_bytes is not None else "")
    return int(ExitCode.DONE)


def _profile(cluster: str | None, *, optional: bool = False) -> Any:
    from orchestrator.pipeline.resolve import resolve_profile
    from orchestrator.project import find_project

    project = find_project(Path.cwd())
    if optional and cluster is None and project.file.cluster is None:
        return None
    return resolve_profile(cluster, project, LocalLayout.for_user())


def _node(world: Services, named: NamedProfile) -> Node:
    from orchestrator.payload import build_payload

    return world.open_node(named.profile, build_payload(world.layout))
