"""sync: the checkpoint and the user's code on the node, verified; nothing is sent that is there already."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.errors import CheckpointError, ConfigurationError, RemoteEvalError
from orchestrator.inspection import inspect_ahead, inspect_local
from orchestrator.pipeline.ahead import Ahead
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.early import changed_since_begun, chunk_classes, first_share
from orchestrator.pipeline.elsewhere import copy_from_source, copy_rest
from orchestrator.pipeline.folders import send_local_folder
from orchestrator.pipeline.locate import find_by_content, locate_at, locate_in_place
from orchestrator.pipeline.room import gc_offered
from orchestrator.pipeline.send import prepare_streams, send_to_node
from orchestrator.plan import RunPlan, SyncedCheckpoint, local_checkpoint
from orchestrator.project import find_project
from orchestrator.transfer.archive import pack_code
from orchestrator.transfer.draft import Draft
from orchestrator.transfer.fingerprints import LocalFile, digest_local_file
from orchestrator.transfer.node_copy import CopiedCheckpoint
from orchestrator.transfer.order import ChunkClass, sending_order
from orchestrator.transfer.progress import ProgressListener, TransferProgress
from orchestrator.transfer.upload import LocalFileChangedError, UploadResult
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import Unpacked, UnpackRequest


def file_ahead(context: RunContext) -> Ahead:
    """For `sync_checkpoint`: the file or folder that is to be sent, if it is one of this machine. What can go on beside
    preflight waits for its `begin`."""
    plan = context.plan
    is_here = plan.checkpoint.cluster is None and not context.profile.embedded
    path = local_checkpoint(plan.checkpoint) if is_here else None
    if path is None:
        return Ahead(context, None, lambda spans: range(len(spans)), _telling(context))
    if not path.is_dir():
        inspect_ahead(path)
    return Ahead(context, path, functools.partial(_order_of_draft, plan, path), _telling(context))


def sync_checkpoint(context: RunContext, ahead: Ahead, *, may_start_early: bool = False) -> SyncedCheckpoint:
    """Find the checkpoint on the node, by content where it lies elsewhere; else send it, or copy it from its node.

    `may_start_early`: the weights suffice for now where a job begins with them; the rest is for `send_rest` then.
    """
    if ahead.path is not None and ahead.path.is_dir():
        return send_local_folder(context, ahead.folder())
    if ahead.path is not None:
        return _send_file(context, ahead.path, ahead, may_start_early)
    if context.source is not None:
        return copy_from_source(context, context.source, may_start_early=may_start_early)
    if context.plan.checkpoint.cluster is not None:
        return locate_in_place(context.node, context.plan.checkpoint, context.plan.run_id)
    return _here(context, local_checkpoint(context.plan.checkpoint))


def send_rest(context: RunContext, begun: SyncedCheckpoint, meanwhile: Callable[[], None]) -> SyncedCheckpoint:
    """Send what is missing of a checkpoint whose first chunks are on the node. `meanwhile` is called all the time, and
    what it raises ends the sending. Raises `IntegrityError` where the file changed."""
    tell = _telling(context)

    def on_progress(progress: TransferProgress) -> None:
        tell(progress)
        meanwhile()

    if context.source is not None:
        sent: UploadResult | CopiedCheckpoint = copy_rest(context, context.source, begun, on_progress)
    else:
        path = local_checkpoint(context.plan.checkpoint)
        local = digest_local_file(path, context.services.layout)
        if local.manifest.digest != begun.digest:
            raise changed_since_begun(context.plan, str(path))
        classes = _classes_of_hashed(path, local)
        order = None if classes is None else sending_order(classes)
        sent = _upload(context, path, local.manifest, on_progress=on_progress, order=order)
    return dataclasses.replace(begun, bytes_sent=begun.bytes_sent + sent.bytes_sent, is_complete=sent.is_complete)


def sync_code(context: RunContext) -> None:
    """Put the user's code on the node, in its content-addressed folder. It must still be what was planned."""
    plan = context.plan
    if plan.code is None:
        return
    project = find_project(Path(plan.project_folder or "."))
    archive = pack_code(project.folder, list(plan.code_paths), context.services.layout)
    if archive.sha256 != plan.code.archive_sha256:
        raise ConfigurationError(
            "the code has changed since this run was planned",
            action="Start a new run, or bring the code back to what it was.",
        )
    local = digest_local_file(archive.path, context.services.layout)
    sent = _upload(context, archive.path, local.manifest, on_progress=lambda _: None)
    request = UnpackRequest(context.node.layout.root, sent.path_on_node, archive.sha256)
    context.node.call("unpack_code", request, Unpacked)


def _here(context: RunContext, path: Path) -> SyncedCheckpoint:
    """The embedded node is this machine: what is here is used where it is. A file's digest is known all the same; a
    folder's files' names and times stand for it."""
    found = locate_at(context.node, str(path), context.plan.run_id)
    if found is None:
        raise CheckpointError(f"there is no file at {path}", action="Check --checkpoint.")
    if path.is_dir():
        return found
    return dataclasses.replace(found, digest=digest_local_file(path, context.services.layout).manifest.digest)


def _send_file(context: RunContext, path: Path, ahead: Ahead, may_start_early: bool) -> SyncedCheckpoint:
    """Have the file on the node, which may have it already."""
    local, draft = ahead.finish()
    found = find_by_content(context, local.manifest)
    if found is not None:
        draft.end(is_given_up=True)
        draft.close()
        context.node.drop_prepared_streams()
        return found
    if local.was_remembered and not ahead.has_streams:
        prepare_streams(context, path.stat().st_size)
    try:
        return _send(context, path, local, draft, may_start_early)
    except LocalFileChangedError:
        if not local.was_remembered:
            raise
    # The remembered digest was of another content with the same size, time and sampled bytes: read it anew, once.
    local = digest_local_file(path, context.services.layout, use_remembered=False)
    return _send(context, path, local, None, may_start_early)


def _send(
    context: RunContext, path: Path, local: LocalFile, draft: Draft | None, may_start_early: bool
) -> SyncedCheckpoint:
    """Send the file, what jobs read first before the rest; no rest where nobody needs it, or not yet."""
    manifest = local.manifest
    may_start_early = may_start_early and not local.was_remembered
    share = first_share(context.plan, manifest, _classes_of_hashed(path, local), may_start_early=may_start_early)
    sent = _upload(context, path, manifest, on_progress=_telling(context), order=share.order, draft=draft)
    if sent.note:
        context.reporter.note(sent.note)
    if share.note and not sent.is_complete:  # a draft may have brought the rest
        context.reporter.note(share.note)
    how = "sent" if sent.bytes_sent or not sent.is_complete else "store"
    return SyncedCheckpoint(
        sent.path_on_node, manifest.digest, manifest.size, (), how, sent.bytes_sent, is_complete=sent.is_complete
    )


def _telling(context: RunContext) -> ProgressListener:
    return functools.partial(context.reporter.transfer, "checkpoint")


def _upload(
    context: RunContext,
    path: Path,
    manifest: ChunkManifest,
    *,
    on_progress: ProgressListener,
    order: list[int] | None = None,
    draft: Draft | None = None,
) -> UploadResult:
    with gc_offered(context.node, context.journal, context.plan.cluster):
        return send_to_node(context, path, manifest, on_progress, order, draft)


def _classes_of_hashed(path: Path, local: LocalFile) -> list[ChunkClass] | None:
    """What each chunk holds; None where no header can be read, or not that of the file that was hashed."""
    hashed = local.fingerprint
    return _chunk_classes(path, local.manifest.spans, (hashed.size, hashed.mtime_ns, hashed.inode))


def _order_of_draft(plan: RunPlan, path: Path, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Which chunks go while the file is still being hashed: no rest that no job of the run reads."""
    classes = _chunk_classes(path, spans)
    if classes is None:
        return list(range(len(spans)))
    needs_rest = not all(job.reads_weights_only for job in plan.jobs)
    return [index for index in sending_order(classes) if needs_rest or classes[index] is not ChunkClass.REST]


def _chunk_classes(
    path: Path, spans: Sequence[tuple[int, int]], facts: tuple[int, int, int] | None = None
) -> list[ChunkClass] | None:
    """As `early.chunk_classes`; None too where no header can be read."""
    try:
        return chunk_classes(inspect_local(path), str(path), spans, facts)
    except RemoteEvalError:
        return None
