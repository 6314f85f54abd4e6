"""Sending to the run's node, within the limits of its profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.errors import UnreachableError
from orchestrator.node import BULK_BYTES
from orchestrator.pipeline.context import RunContext
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.draft import Draft
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.source import Source
from orchestrator.transfer.stream_count import first_guess
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import KnownChunks, KnownRequest
from remote_payload.wire.processors import usable_processors


def carrier_to_node(context: RunContext) -> Carrier:
    """Carries files within the limits of this run's profile."""
    return Carrier(
        context.node,
        bandwidth_limit_bytes_per_s=context.profile.bandwidth_limit_bytes_per_s,
        packing=context.profile.pack_floats,
    )


def send_to_node(
    context: RunContext,
    local: Path | Source,
    manifest: ChunkManifest,
    on_progress: ProgressListener,
    order: Sequence[int] | None = None,
    draft: Draft | None = None,
    carrier: Carrier | None = None,
) -> UploadResult:
    """`upload_file` for this run, by a carrier of its own unless there is one for several files."""
    return upload_file(
        carrier or context.node,
        local,
        manifest,
        on_progress=on_progress,
        bandwidth_limit_bytes_per_s=context.profile.bandwidth_limit_bytes_per_s,
        packing=context.profile.pack_floats,
        order=order,
        draft=draft,
        run_id=context.plan.run_id,
        store_limit_bytes=context.profile.store_limit_bytes,
    )


def draft_to_node(
    context: RunContext,
    path: Path,
    order: Callable[[Sequence[tuple[int, int]]], Sequence[int]],
    on_progress: ProgressListener,
    *,
    ask_known: Callable[[int], KnownChunks],
    is_awaited: Callable[[], bool],
) -> Draft:
    """A draft of a local file for this run. Streams come up as soon as the draft begins: the file is likely to be sent.
    Nothing of it goes before `ask_known` returns, which raises where nothing may."""

    def begin(spans: Sequence[tuple[int, int]]) -> Sequence[int]:
        prepare_streams(context, sum(length for _, length in spans))
        return order(spans)

    return Draft(
        carrier_to_node(context),
        path,
        order=begin,
        ask_known=ask_known,
        on_progress=on_progress,
        run_id=context.plan.run_id,
        store_limit_bytes=context.profile.store_limit_bytes,
        is_awaited=is_awaited,
    )


def ask_known(context: RunContext, size: int) -> KnownChunks:
    """Which chunks the node may have. For a thread: over the connection that is there, from which nobody is asked to
    log in. Raises `UnreachableError` where that is lost."""
    request = KnownRequest(context.node.root, size, tuple(context.profile.checkpoint_roots))
    known = context.node.call_if_connected("known_chunks", request, KnownChunks)
    if known is None:
        raise UnreachableError("the connection was lost before the node had said what it has")
    return known


def prepare_streams(context: RunContext, size: int) -> None:
    """Have streams come up for a file of so many bytes, where those of a connection of their own are for it."""
    if size >= BULK_BYTES:
        limit, processors = context.profile.bandwidth_limit_bytes_per_s, usable_processors()
        context.node.prepare_streams(lambda round_trip_s: 1 if limit else first_guess(round_trip_s, processors))
