"""Sending to the run's node, within the limits of its profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.pipeline.context import RunContext
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.sender import Source
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunks import ChunkManifest


def send_to_node(
    context: RunContext,
    local: Path | Source,
    manifest: ChunkManifest,
    on_progress: ProgressListener,
    order: Sequence[int] | None = None,
) -> UploadResult:
    """`upload_file` for this run."""
    return upload_file(
        context.node,
        local,
        manifest,
        on_progress=on_progress,
        bandwidth_limit_bytes_per_s=context.profile.bandwidth_limit_bytes_per_s,
        packing=context.profile.pack_floats,
        order=order,
        run_id=context.plan.run_id,
        store_limit_bytes=context.profile.store_limit_bytes,
    )
