"""`remote-eval fetch`: a checkpoint, a folder of one, or an artifact from a node to here."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import posixpath
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.output import print_json
from orchestrator.cli.session import services
from orchestrator.errors import ExitCode, IntegrityError, UsageError
from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_member_path, printable
from remote_payload.wire.units import human_bytes

if TYPE_CHECKING:
    from orchestrator.transfer.fetch import FetchResult
    from remote_payload.wire.messages import FileList

_LIST_TIMEOUT_S = 60.0


def fetch(
    reference: str, local: Path | None, *, force: bool, streams: int | None, limit_mbps: float | None, as_json: bool
) -> int:
    """Bring `CLUSTER:path` to `local`: a folder to put it in, or the name that it gets; default: here.

    Where `local` is another cluster's name with a colon, the file goes into that node's store.
    """
    from orchestrator.layout import LocalLayout
    from orchestrator.payload import build_payload
    from orchestrator.pipeline.resolve import resolve_profile
    from orchestrator.plan import CheckpointReference, node_path
    from orchestrator.project import find_project
    from orchestrator.transfer.carrier import Carrier
    from orchestrator.transfer.fetch import fetch_file
    from orchestrator.transfer.small_files import SMALL_BYTES, RemoteFile, fetch_small_files
    from orchestrator.transfer.stream_count import StreamPolicy
    from remote_payload.wire.messages import FileList, ListRequest

    if local is not None and str(local).endswith(":") and not local.exists():
        return _copy(reference, str(local)[:-1], streams=streams, limit_mbps=limit_mbps, as_json=as_json)
    cluster, colon, path = reference.partition(":")
    if not (cluster and colon and path) or "/" in cluster:
        raise UsageError(f"{reference!r} names no file on a cluster", action="Write CLUSTER:PATH.")
    named = resolve_profile(cluster, find_project(Path.cwd()), LocalLayout.for_user())
    world = services(as_json=as_json)
    limit = limit_mbps * 1e6 / 8 if limit_mbps is not None else named.profile.bandwidth_limit_bytes_per_s
    results: list[FetchResult] = []
    with world.open_node(named.profile, build_payload(world.layout)) as node:
        there = node_path(CheckpointReference(path, cluster), named.profile.checkpoint_roots)
        listed = node.call("list_files", ListRequest(node.root, there), FileList, timeout_s=_LIST_TIMEOUT_S)
        check_names(file.name for file in listed.files if listed.is_folder)
        base = target_of(listed, local)
        _refuse_too_little_room(base, sum(max(0, file.size) for file in listed.files))
        files = [
            RemoteFile(posixpath.join(listed.path, file.name), file, base.joinpath(*file.name.split("/")))
            if listed.is_folder
            else RemoteFile(listed.path, file, base)
            for file in listed.files
        ]
        for folder in {file.target.parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
        small = [file for file in files if listed.is_folder and file.listed.size < SMALL_BYTES]
        if small:
            results += fetch_small_files(
                node,
                small,
                overwrite=force,
                bandwidth_limit_bytes_per_s=limit,
                on_progress=functools.partial(world.reporter.transfer, f"{len(small)} small files"),
            )
        large = [file for file in files if file not in small]
        with Carrier(
            node, bandwidth_limit_bytes_per_s=limit, streams=StreamPolicy(fixed=streams), packing=False
        ) as carrier:
            carrier.expect(sum(file.listed.size for file in large))
            for file in large:
                done = fetch_file(
                    carrier,
                    file.path,
                    file.listed,
                    file.target,
                    overwrite=force,
                    packing=named.profile.pack_floats,
                    on_progress=functools.partial(world.reporter.transfer, file.target.name),
                )
                results.append(done)
    _show(base, results, as_json=as_json)
    return int(ExitCode.DONE)


def _copy(reference: str, other: str, *, streams: int | None, limit_mbps: float | None, as_json: bool) -> int:
    """From one node into the store of another."""
    from orchestrator.layout import LocalLayout
    from orchestrator.payload import build_payload
    from orchestrator.pipeline.resolve import resolve_profile
    from orchestrator.pipeline.room import gc_offered
    from orchestrator.plan import CheckpointReference, new_run_id, node_path
    from orchestrator.project import find_project
    from orchestrator.transfer.direct import DirectWay
    from orchestrator.transfer.node_copy import DescribedFolder, copy_checkpoint, describe
    from orchestrator.transfer.stream_count import StreamPolicy

    cluster, _, path = reference.partition(":")
    layout, project = LocalLayout.for_user(), find_project(Path.cwd())
    near, far = resolve_profile(cluster, project, layout), resolve_profile(other, project, layout)
    world = services(as_json=as_json)
    payload = build_payload(world.layout)
    with (
        world.open_node(near.profile, payload) as source,
        world.open_node(far.profile, payload) as target,
        gc_offered(target, world.journal, other),
    ):
        there = node_path(CheckpointReference(path, cluster), near.profile.checkpoint_roots)
        described = describe(source, there)
        # Of a folder the files that have arrived are kept, under a name, while the others still come.
        name = new_run_id(datetime.datetime.now(datetime.timezone.utc))
        way = DirectWay(source, target, (cluster, other), world.reporter.note)
        done = copy_checkpoint(
            source,
            described,
            target,
            way=way,
            streams=StreamPolicy(fixed=streams),
            bandwidth_limit_bytes_per_s=limit_mbps * 1e6 / 8 if limit_mbps is not None else None,
            on_progress=functools.partial(world.reporter.transfer, posixpath.basename(described.path)),
            run_id=name if isinstance(described, DescribedFolder) else "",
        )
    if done.note:
        world.reporter.note(done.note)
    reached = f"{other}:{done.path}"
    if as_json:
        facts = {"bytes": done.size, "bytes_sent": done.bytes_sent, "seconds": done.seconds}
        taken = {"direct": done.is_direct, "way": printable(way.said)}
        print_json({"checkpoint": reached, "digest": done.digest, **facts, **taken})
    else:
        print(printable(f"{reached}: {human_bytes(done.size)}, {human_bytes(done.bytes_sent)} sent, verified"))
    return int(ExitCode.DONE)


def check_names(names: Iterable[str]) -> None:
    """Refuse what could lead out of the folder, or hide. Raises `IntegrityError`."""
    seen = set()
    for name in names:
        try:
            check_member_path(name)
        except WireError as error:
            raise IntegrityError(
                f"the node names a file that could lead elsewhere: {error}",
                action="Do not trust this node; tell its administrator.",
            ) from error
        if name.lower() in seen:
            raise IntegrityError(f"the node names {printable(name)!r} twice")
        seen.add(name.lower())


def target_of(listed: FileList, local: Path | None) -> Path:
    """Where it lands: `local` itself, or below it where that is a folder. Raises `UsageError`."""
    name = posixpath.basename(listed.path.rstrip("/"))
    into = (local or Path()).expanduser()
    if local is not None and not into.is_dir() and not os.fspath(local).endswith("/"):
        if not into.parent.is_dir():
            raise UsageError(f"there is no folder {into.parent}", action="Make it, or name another place.")
        return into
    if not into.is_dir():
        raise UsageError(f"there is no folder {into}", action="Make it, or name another place.")
    try:
        check_member_path(name)
    except WireError as error:
        raise UsageError(
            f"it cannot have its own name here: {printable(str(error))}", action="Name it: CLUSTER:PATH NAME."
        ) from error
    return into / name


def _refuse_too_little_room(base: Path, needed: int) -> None:
    folder = base if base.is_dir() else base.parent
    free = shutil.disk_usage(folder).free
    # What is here already, whole or in part, needs no room again; a fetch that finds none stops and is gone on with.
    if needed > free and not base.exists() and not list(folder.glob(".remote-eval-*.journal")):
        raise UsageError(
            f"{human_bytes(needed)} do not fit into {folder}, which has {human_bytes(free)} left",
            action="Free space, or name another place.",
        )


def _show(base: Path, results: list[FetchResult], *, as_json: bool) -> None:
    total, received = (sum(getattr(one, name) for one in results) for name in ("bytes_total", "bytes_received"))
    seconds = sum(one.seconds for one in results)
    if as_json:
        files = [{**dataclasses.asdict(one), "target": str(one.target)} for one in results]
        print_json({"path": str(base), "bytes": total, "bytes_received": received, "seconds": seconds, "files": files})
        return
    rate = f", {human_bytes(int(received / seconds))}/s" if received and seconds > 0 else ""
    print(printable(f"{base}: {human_bytes(total)}, {human_bytes(received)} of it fetched{rate}, verified"))
