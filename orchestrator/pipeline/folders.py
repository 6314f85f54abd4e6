"""sync of a checkpoint that is a folder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.room import gc_offered
from orchestrator.pipeline.send import carrier_to_node, send_to_node
from orchestrator.plan import SyncedCheckpoint
from orchestrator.transfer.folder import FolderFile, LocalFolder, SentFolder, send_folder
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.upload import LocalFileChangedError, UploadResult
from remote_payload.wire.chunks import ChunkManifest


def send_local_folder(context: RunContext, path: Path) -> SyncedCheckpoint:
    """Have the folder in the node's store, sending what that lacks. Raises `IntegrityError` where it changes."""
    local = LocalFolder(path, context.services.layout)
    try:
        sent = _send(context, local)
    except LocalFileChangedError:
        local.check_unchanged()
        # A remembered digest was of another content with the same size, time and sampled bytes: read all anew, once.
        local = LocalFolder(path, context.services.layout, use_remembered=False)
        sent = _send(context, local)
    local.check_unchanged()
    if not sent.bytes_sent:
        context.reporter.note("the checkpoint is on the node already (store): 0 bytes to send")
    how = "sent" if sent.bytes_sent else "store"
    return SyncedCheckpoint(sent.path, local.folder.digest, local.folder.size, (), how, sent.bytes_sent)


def _send(context: RunContext, local: LocalFolder) -> SentFolder:
    def upload(files: Sequence[FolderFile], manifest: ChunkManifest, on_progress: ProgressListener) -> UploadResult:
        return send_to_node(context, local.open(files), manifest, on_progress, carrier=carrier)

    report = functools.partial(context.reporter.transfer, "checkpoint")
    with gc_offered(context.node, context.journal, context.plan.cluster), carrier_to_node(context) as carrier:
        return send_folder(context.node, local.folder, carrier, upload, report, run_id=context.plan.run_id)
