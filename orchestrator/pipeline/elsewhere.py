"""A checkpoint on another cluster's node than the run's: its header is read there, and it is copied from there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from orchestrator.errors import RemoteEvalError, UsageError
from orchestrator.inspection import INSPECT_TIMEOUT_S, unreadable
from orchestrator.node import Node
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.locate import find_by_content, locate_in_place
from orchestrator.pipeline.room import gc_offered
from orchestrator.plan import SyncedCheckpoint
from orchestrator.transfer.direct import DirectWay
from orchestrator.transfer.node_copy import DescribedFolder, copy_checkpoint, describe, is_unchanged
from orchestrator.transfer.node_files import DescribedFile
from orchestrator.transfer.order import ChunkClass, classify, sending_order, tensor_bytes
from orchestrator.transfer.source import LocalFileChangedError
from remote_payload.wire.codec import to_json
from remote_payload.wire.messages import InspectRequest
from remote_payload.wire.units import human_bytes


def inspect_on_source(source: Node, path: str) -> dict[str, Any]:
    """As `inspect_local`, by the node that holds the checkpoint."""
    request = to_json(InspectRequest(path, source.layout.root))
    try:
        found = source.call_json("inspect", request, timeout_s=INSPECT_TIMEOUT_S)
    except UsageError as error:
        raise unreadable({"kind": error.details, "message": error.cause, "action": error.action}) from error
    return {key: found.get(key) for key in ("header", "findings", "reads")}


def copy_from_source(context: RunContext, source: Node) -> SyncedCheckpoint:
    """Put the checkpoint on the run's node, as far as that lacks its content."""
    located = locate_in_place(source, context.plan.checkpoint, context.plan.run_id)
    described = describe(source, located.path)
    names = (context.plan.checkpoint.cluster or "the other node", context.plan.cluster)
    way = DirectWay(source, context.node, names, context.reporter.note)
    try:
        found = _copied(context, source, described, way)
    except LocalFileChangedError:
        if not is_unchanged(source, described):
            raise
        # What the node remembered was of another content with the same facts and sampled bytes: read it anew, once.
        found = _copied(context, source, describe(source, located.path, anew=True), way)
    return dataclasses.replace(found, source_path=located.path, source_fingerprint=located.fingerprint)


def _copied(
    context: RunContext, source: Node, described: DescribedFile | DescribedFolder, way: DirectWay
) -> SyncedCheckpoint:
    found = None if isinstance(described, DescribedFolder) else find_by_content(context, described.manifest)
    if found is not None:
        return found
    order = _sending_order(context, source, described) if isinstance(described, DescribedFile) else None
    with gc_offered(context.node, context.journal, context.plan.cluster):
        done = copy_checkpoint(
            source,
            described,
            context.node,
            way=way,
            on_progress=functools.partial(context.reporter.transfer, "checkpoint"),
            run_id=context.plan.run_id,
            order=order,
        )
    how = "copied" if done.bytes_sent else "store"
    if not done.bytes_sent:
        context.reporter.note("the checkpoint is on the node already (store): 0 bytes to send")
    return SyncedCheckpoint(done.path, done.digest, done.size, (), how, done.bytes_sent, is_complete=done.is_complete)


def _sending_order(context: RunContext, source: Node, described: DescribedFile) -> list[int] | None:
    """What `reconstruct` reads before the rest, and no rest where no job reads more; None where no header can be read,
    or not that of the file that was described."""
    try:
        inspected = inspect_on_source(source, described.path)
    except RemoteEvalError:
        return None
    header, listed, manifest = inspected["header"], described.listed, described.manifest
    is_the_file = [file["path"] for file in header["files"]] == [described.path]
    if not is_the_file or header["fingerprint"] != [listed.size, listed.mtime_ns, listed.inode]:
        return None
    classes = classify(manifest.spans, tensor_bytes(header, inspected["reads"]))
    order = sending_order(classes)
    if ChunkClass.REST not in classes or not all(job.reads_weights_only for job in context.plan.jobs):
        return order
    needed = [index for index in order if classes[index] is not ChunkClass.REST]
    shares = f"{human_bytes(sum(manifest.chunks[i].length for i in needed))} of {human_bytes(manifest.size)}"
    context.reporter.note(f"only the weights are sent ({shares}): reconstruct needs no more")
    return needed
