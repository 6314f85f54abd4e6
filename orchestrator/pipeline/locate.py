"""Finding a checkpoint that is on the run's node already."""

from __future__ import annotations

from orchestrator.errors import CheckpointError
from orchestrator.node import Node
from orchestrator.pipeline.context import RunContext
from orchestrator.plan import CheckpointReference, SyncedCheckpoint, node_path
from remote_payload.wire.chunks import ChunkManifest, sample_spans
from remote_payload.wire.messages import Located, LocateRequest

LOCATE_TIMEOUT_S = 900.0
"""A candidate of the same size is read in full on the node before it counts as the same file."""


def locate_in_place(node: Node, reference: CheckpointReference, run_id: str) -> SyncedCheckpoint:
    """The checkpoint where `reference` says that `node` has it. Raises `CheckpointError` where it does not."""
    path = node_path(reference, node.profile.checkpoint_roots)
    found = locate_at(node, path, run_id)
    if found is None:
        raise CheckpointError(
            f"there is no file at {reference.cluster}:{path}",
            action="Check the path; relative ones start at the profile's first checkpoint root.",
        )
    return found


def locate_at(node: Node, path: str, run_id: str) -> SyncedCheckpoint | None:
    """What stands at a path on the node, which `run_id` is going to use."""
    return _synced(_locate(node, LocateRequest(node.root, path=path, run_id=run_id)))


def find_by_content(context: RunContext, manifest: ChunkManifest) -> SyncedCheckpoint | None:
    """A file with this content in the node's store or below the profile's checkpoint roots."""
    request = LocateRequest(
        context.node.root,
        digest=manifest.digest,
        size=manifest.size,
        search_roots=tuple(context.profile.checkpoint_roots),
        sample=sample_spans(manifest),
        run_id=context.plan.run_id,
    )
    found = _synced(_locate(context.node, request))
    if found is not None:
        context.reporter.note(f"the checkpoint is on the node already ({found.how}): 0 bytes to send")
    return found


def was_freed(context: RunContext, checkpoint: SyncedCheckpoint) -> bool:
    """Whether what stood in the node's store is there no more. Where it is, it stays for this run."""
    layout = context.node.layout
    digest = checkpoint.digest
    if digest is None or checkpoint.path not in (layout.checkpoint(digest), layout.checkpoint_tree(digest)):
        return False
    request = LocateRequest(layout.root, digest=digest, size=checkpoint.size, run_id=context.plan.run_id)
    return _locate(context.node, request).how != "store"


def _locate(node: Node, request: LocateRequest) -> Located:
    return node.call("locate", request, Located, timeout_s=LOCATE_TIMEOUT_S)


def _synced(found: Located) -> SyncedCheckpoint | None:
    if not found.found:
        return None
    if found.path is None or found.size is None:
        raise CheckpointError("the node found the checkpoint and names no path")
    # A file of the store is known by its digest alone: where it was freed and sent again it is the same.
    is_stored = found.how == "store"
    fingerprint = () if is_stored else tuple(v for v in (found.size, found.mtime_ns, found.inode) if v is not None)
    return SyncedCheckpoint(found.path, found.digest, found.size, fingerprint, found.how)
