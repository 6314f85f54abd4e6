"""A checkpoint on another cluster's node than the run's: its header is read there, and it is copied from there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.inspection import INSPECT_TIMEOUT_S, unreadable
from orchestrator.node import Node
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.locate import find_by_content, locate_in_place
from orchestrator.pipeline.room import gc_offered
from orchestrator.plan import SyncedCheckpoint
from orchestrator.transfer.node_copy import DescribedFile, copy_to_node, describe_file
from remote_payload.wire.codec import to_json
from remote_payload.wire.messages import InspectRequest


def inspect_on_source(source: Node, path: str) -> dict[str, Any]:
    """As `inspect_local`, by the node that holds the file."""
    request = to_json(InspectRequest(path, source.layout.root))
    try:
        found = source.call_json("inspect", request, timeout_s=INSPECT_TIMEOUT_S)
    except UsageError as error:
        raise unreadable({"kind": error.details, "message": error.cause, "action": error.action}) from error
    return {"header": found.get("header"), "findings": found.get("findings")}


def copy_from_source(context: RunContext, source: Node) -> SyncedCheckpoint:
    """Put the checkpoint on the run's node, as far as that lacks its content."""
    located = locate_in_place(source, context.plan.checkpoint, context.plan.run_id)
    file = describe_file(source, located.path)
    found = find_by_content(context, file.manifest) or _copied(context, source, file)
    return dataclasses.replace(found, source_path=located.path, source_fingerprint=located.fingerprint)


def _copied(context: RunContext, source: Node, file: DescribedFile) -> SyncedCheckpoint:
    limits = [profile.bandwidth_limit_bytes_per_s for profile in (source.profile, context.profile)]
    with gc_offered(context.node, context.journal, context.plan.cluster):
        done = copy_to_node(
            source,
            file,
            context.node,
            bandwidth_limit_bytes_per_s=min((limit for limit in limits if limit is not None), default=None),
            packing=source.profile.pack_floats and context.profile.pack_floats,
            on_progress=functools.partial(context.reporter.transfer, "checkpoint"),
            run_id=context.plan.run_id,
            store_limit_bytes=context.profile.store_limit_bytes,
        )
    return SyncedCheckpoint(done.path_on_node, file.manifest.digest, file.manifest.size, (), "copied", done.bytes_sent)
