"""A checkpoint on another cluster's node than the run's: its header is read there, and it is copied from there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from orchestrator.errors import RemoteEvalError, UsageError
from orchestrator.inspection import INSPECT_TIMEOUT_S, unreadable
from orchestrator.node import Node
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.early import Share, changed_since_begun, chunk_classes, first_share
from orchestrator.pipeline.locate import find_by_content, locate_in_place
from orchestrator.pipeline.room import gc_offered
from orchestrator.plan import SyncedCheckpoint
from orchestrator.transfer.node_copy import (
    CopiedCheckpoint,
    DescribedFolder,
    copy_checkpoint,
    describe,
    is_unchanged,
)
from orchestrator.transfer.node_files import DescribedFile
from orchestrator.transfer.order import ChunkClass, sending_order
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.source import LocalFileChangedError
from remote_payload.wire.codec import to_json
from remote_payload.wire.messages import InspectRequest


def inspect_on_source(source: Node, path: str) -> dict[str, Any]:
    """As `inspect_local`, by the node that holds the checkpoint."""
    request = to_json(InspectRequest(path, source.layout.root))
    try:
        found = source.call_json("inspect", request, timeout_s=INSPECT_TIMEOUT_S)
    except UsageError as error:
        raise unreadable({"kind": error.details, "message": error.cause, "action": error.action}) from error
    return {key: found.get(key) for key in ("header", "findings", "reads")}


def copy_from_source(context: RunContext, source: Node, *, may_start_early: bool) -> SyncedCheckpoint:
    """Put the checkpoint on the run's node, as far as that lacks its content, and as far as is needed for now."""
    located = locate_in_place(source, context.plan.checkpoint, context.plan.run_id)
    described = describe(source, located.path)
    try:
        found = _copied(context, source, described, may_start_early)
    except LocalFileChangedError:
        if not is_unchanged(source, described):
            raise
        # What the node remembered was of another content with the same facts and sampled bytes: read it anew, once.
        found = _copied(context, source, describe(source, located.path, anew=True), may_start_early)
    return dataclasses.replace(found, source_path=located.path, source_fingerprint=located.fingerprint)


def copy_rest(
    context: RunContext, source: Node, begun: SyncedCheckpoint, on_progress: ProgressListener
) -> CopiedCheckpoint:
    """Copy what is missing of a checkpoint whose first chunks are on the run's node. Raises `IntegrityError` where it
    changed."""
    located = locate_in_place(source, context.plan.checkpoint, context.plan.run_id)
    described = describe(source, located.path)
    if not isinstance(described, DescribedFile) or described.manifest.digest != begun.digest:
        raise changed_since_begun(context.plan, str(context.plan.checkpoint))
    classes = _chunk_classes(source, described)
    order = None if classes is None else sending_order(classes)
    return _copy(context, source, described, order, on_progress)


def _copied(
    context: RunContext, source: Node, described: DescribedFile | DescribedFolder, may_start_early: bool
) -> SyncedCheckpoint:
    share = Share(None)
    if isinstance(described, DescribedFile):
        found = find_by_content(context, described.manifest)
        if found is not None:
            return found
        may_start_early = may_start_early and not described.was_remembered
        classes = _chunk_classes(source, described)
        share = first_share(context.plan, described.manifest, classes, may_start_early=may_start_early)
    report = functools.partial(context.reporter.transfer, "checkpoint")
    done = _copy(context, source, described, share.order, report)
    if done.note:
        context.reporter.note(done.note)
    if not done.is_complete:
        context.reporter.note(share.note)
    elif not done.bytes_sent:
        context.reporter.note("the checkpoint is on the node already (store): 0 bytes to send")
    how = "copied" if done.bytes_sent or not done.is_complete else "store"
    return SyncedCheckpoint(done.path, done.digest, done.size, (), how, done.bytes_sent, is_complete=done.is_complete)


def _copy(
    context: RunContext,
    source: Node,
    described: DescribedFile | DescribedFolder,
    order: list[int] | None,
    on_progress: ProgressListener,
) -> CopiedCheckpoint:
    with gc_offered(context.node, context.journal, context.plan.cluster):
        return copy_checkpoint(
            source,
            described,
            context.node,
            way=context.way,
            on_progress=on_progress,
            run_id=context.plan.run_id,
            order=order,
        )


def _chunk_classes(source: Node, described: DescribedFile) -> list[ChunkClass] | None:
    """What each chunk holds; None where no header can be read, or not that of the file that was described."""
    try:
        inspected = inspect_on_source(source, described.path)
    except RemoteEvalError:
        return None
    listed, spans = described.listed, described.manifest.spans
    return chunk_classes(inspected, described.path, spans, (listed.size, listed.mtime_ns, listed.inode))
