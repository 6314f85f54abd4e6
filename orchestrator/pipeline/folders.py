"""sync of a checkpoint that is a folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from orchestrator.node import BULK_BYTES
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.room import gc_offered
from orchestrator.pipeline.send import ask_known, carrier_to_node, send_to_node
from orchestrator.plan import SyncedCheckpoint
from orchestrator.transfer.folder import FolderFile, FolderProgress, SentFolder, send_folder, send_hashed
from orchestrator.transfer.local_folder import LocalFolder
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.upload import LocalFileChangedError, UploadResult
from remote_payload.wire.chunks import ChunkManifest


def send_local_folder(context: RunContext, local: LocalFolder) -> SyncedCheckpoint:
    """Have the folder in the node's store, sending what that lacks. Raises `IntegrityError` where it changes."""
    try:
        return _synced(context, local)
    except LocalFileChangedError:
        local.check_unchanged()
    # A remembered digest was of another content with the same size, time and sampled bytes: read all anew, once.
    with LocalFolder(local.path, context.services.layout, use_remembered=False) as anew:
        return _synced(context, anew)


def _synced(context: RunContext, local: LocalFolder) -> SyncedCheckpoint:
    sent = _send(context, local)
    local.check_unchanged()
    if sent.note:
        context.reporter.note(sent.note)
    if not sent.bytes_sent:
        context.reporter.note("the checkpoint is on the node already (store): 0 bytes to send")
    how = "sent" if sent.bytes_sent else "store"
    return SyncedCheckpoint(sent.path, local.folder.digest, local.size, (), how, sent.bytes_sent)


def _send(context: RunContext, local: LocalFolder) -> SentFolder:
    def upload(files: Sequence[FolderFile], manifest: ChunkManifest, on_progress: ProgressListener) -> UploadResult:
        return send_to_node(context, local.open(files), manifest, on_progress, carrier=carrier)

    progress = FolderProgress(local.size, functools.partial(context.reporter.transfer, "checkpoint"))
    sent_before = 0
    with gc_offered(context.node, context.journal, context.plan.cluster), carrier_to_node(context) as carrier:
        if local.size >= BULK_BYTES and not local.is_read:
            carrier.expect(local.size)
            known = ask_known(context, local.size).as_set()
            sent_before = send_hashed(local.hashed_before_others(), known, upload, progress)
        sent = send_folder(context.node, local.folder, carrier, upload, progress, run_id=context.plan.run_id)
    return dataclasses.replace(sent, bytes_sent=sent_before + sent.bytes_sent)
