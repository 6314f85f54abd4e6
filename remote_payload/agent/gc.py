"""Deleting what is no longer needed under the node root, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Optional

from remote_payload.agent import attempts, locks, own_code, quota, root, store
from remote_payload.agent.bytecode import compiled_path
from remote_payload.agent.failure import AgentError
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import Deletable, GcReport, GcRequest, Pinned
from remote_payload.wire.names import check_run_id
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.states import Decision

_DAY_S = 86_400.0
_IN_USE_S = 3600.0
"""What changed less than this long ago may belong to a run that has not been claimed yet."""


@dataclasses.dataclass(frozen=True)
class _Item:
    path: str
    size: int
    last_used: float


def gc(request: GcRequest) -> GcReport:
    """Delete finished runs past `keep_days`; stored files past `keep_days` that no remaining run refers to; and, least
    recently used first, as many checkpoints as keep the store over `keep_bytes`, those that finished runs refer to too.

    Raises `AgentError` where the root lacks our marker. A run that may still start or run stays, and so does what it
    refers to; of the store also what is arriving or was located for a run that is about to start.
    """
    layout = root.open_root(request.root)
    with contextlib.nullcontext() if request.dry_run else locks.alone(layout.store_lock, "making room"):
        return _gc(layout, request)


def _gc(layout: NodeLayout, request: GcRequest) -> GcReport:
    now = time.time()
    oldest_kept = now - max(request.keep_days, 0.0) * _DAY_S
    doomed = [
        item
        for item in _items(layout.runs)
        if os.path.basename(item.path) not in request.pinned_runs
        and item.last_used <= oldest_kept
        and _is_finished(layout, os.path.basename(item.path), request.dry_run, _is_idle(item, now))
    ]
    used = _referenced(layout, {item.path for item in doomed})
    loose = [item for folder in (layout.payloads, layout.code) for item in _items(folder) if item.path not in used]
    doomed += [item for item in loose if _is_idle(item, now) and item.last_used <= oldest_kept]
    stored = store.stored_files(layout)
    pinned = store.pins(layout, stored)
    goes = [
        file
        for file in stored
        if file.folder not in pinned and file.folder not in used and file.last_used <= oldest_kept
    ]
    rest = [file for file in stored if file not in goes]
    if request.keep_bytes is not None:
        excess = sum(file.size + file.to_come for file in rest) - request.keep_bytes
        goes += store.least_recently_used(rest, pinned, excess)
    if not request.dry_run:
        for item in doomed:
            _remove(store.move_away(layout, item.path))
        goes = [file for file in goes if store.free(layout, file)]
        for leftover in _leftovers(layout, now):
            _remove(leftover)
    store_bytes = sum(file.size for file in stored) - (0 if request.dry_run else sum(file.size for file in goes))
    deleted = [Deletable(item.path, item.size, item.last_used) for item in doomed]
    deleted += [Deletable(file.folder, file.size, file.last_used) for file in goes]
    return GcReport(
        deleted=tuple(deleted),
        freed_bytes=sum(item.size for item in deleted),
        store_bytes=store_bytes,
        pinned=tuple(Pinned(f.folder, f.size + f.to_come, pinned[f.folder]) for f in stored if f.folder in pinned),
        free_bytes=quota.space_left(layout.root),
    )


def _is_idle(item: _Item, now: float) -> bool:
    return item.last_used <= now - _IN_USE_S or item.last_used > now + _DAY_S


def _is_finished(layout: NodeLayout, run_id: str, dry_run: bool, idle: bool) -> bool:
    """Whether every attempt is over. One that was claimed long ago and never launched is made void, and stays over."""
    try:
        for attempt in attempts.of_run(layout, check_run_id(run_id)):
            never_launched = attempts.read_decision(attempt) is None
            if never_launched and idle and not dry_run:
                attempts.decide(attempt, Decision.VOID)
            if attempts.is_over(attempt) is not True and not (never_launched and idle and dry_run):
                return False
    except (WireError, AgentError, OSError):
        return False
    return True


def _referenced(layout: NodeLayout, doomed_runs: set[str]) -> set[str]:
    """Stored paths that a remaining run's plan needs. A plan that cannot be read keeps everything."""
    payloads = {path for path in (own_code.archive(),) if path is not None}
    used: set[str] = set()
    for run in _items(layout.runs):
        if run.path in doomed_runs:
            continue
        plan = _plan_of(layout, os.path.basename(run.path))
        if plan is None:
            continue
        payloads.add(layout.payload(plan.payload_sha256))
        if plan.code is not None:
            used.add(layout.code_folder(plan.code.archive_sha256))
        if plan.checkpoint_digest is not None:
            used.add(layout.checkpoint_folder(plan.checkpoint_digest))
        used.add(os.path.dirname(plan.checkpoint_path))
    return used | payloads | {compiled_path(path) for path in payloads}


def _plan_of(layout: NodeLayout, run_id: str) -> Optional[NodePlan]:
    try:
        return attempts.read_plan(layout, check_run_id(run_id))
    except WireError:
        return None


def _items(folder: str) -> Iterator[_Item]:
    """What stands in `folder` under a name of ours; names that begin with a dot are in the making, or doomed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if not entry.name.startswith(".") and not entry.is_symlink():
            yield _measure(entry.path)


def _measure(path: str) -> _Item:
    """Bytes on disk and the latest change of anything in it. Links are counted as themselves."""
    facts = os.lstat(path)
    size, latest = facts.st_blocks * 512, facts.st_mtime
    if stat.S_ISDIR(facts.st_mode):
        for folder, folder_names, file_names in os.walk(path, followlinks=False):
            for name in (*folder_names, *file_names):
                try:
                    facts = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                size += facts.st_blocks * 512
                latest = max(latest, facts.st_mtime)
    return _Item(path, size, latest)


def _leftovers(layout: NodeLayout, now: float) -> list[str]:
    """What an interrupted deletion had already taken away, and what was in the making when its maker was killed."""
    folders = (layout.runs, layout.checkpoints, layout.payloads, layout.code)
    return [
        entry.path
        for folder in folders
        if os.path.isdir(folder)
        for entry in os.scandir(folder)
        if layout.is_doomed(entry.name) or (entry.name.startswith(".") and _is_idle(_measure(entry.path), now))
    ]


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)
