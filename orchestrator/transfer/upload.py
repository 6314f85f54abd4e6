"""Sending a file into a node's store: the chunks that are missing there, over several streams, through any cuts.

The node's journal says what is there; nothing is read again on either side. All streams take chunks from one queue;
what a lost one had under way goes back to it. How many there are is `stream_count`'s to say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import IntegrityError, InternalError, UsageError
from orchestrator.ssh.transport import StreamFacts
from orchestrator.transfer.carrier import Carrier, Sent
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    ReconnectListener,
    ReconnectPolicy,
    StreamOpener,
    with_reconnects,
)
from orchestrator.transfer.draft import Draft
from orchestrator.transfer.flight import Flight
from orchestrator.transfer.progress import ProgressListener, ProgressMeter
from orchestrator.transfer.sender import Outcome, Sender
from orchestrator.transfer.source import LocalFile, LocalFileChangedError, Source
from orchestrator.transfer.stream_count import StreamPolicy
from remote_payload.wire.chunk_table import MAX_CHUNKS, ChunkTable, pack_chunks
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.packing_rates import PackingRates
from remote_payload.wire.stream import FinishedFacts, ReceiveRequest

__all__ = ["LocalFileChangedError", "UploadResult", "upload_file"]


@dataclasses.dataclass(frozen=True)
class UploadResult:
    """`bytes_sent` counts file data including what was sent twice, and what a draft sent; `bytes_saved` is what needed
    no sending: the node had it at the start, or the file repeats it. `bytes_reused`: the part of that which the node
    copied from other files of its store. `bytes_packed` is what packing took off what was sent.
    `streams`: of each stream that was ever open, how it travelled, as far as that is known. `is_complete` False: not
    every chunk was asked for, and the file will stand at `path_on_node` once the others have been sent too. `note`:
    what became of a stored copy that the node did not believe, in words."""

    path_on_node: str
    bytes_sent: int
    bytes_saved: int
    seconds: float
    streams: tuple[StreamFacts, ...] = ()
    bytes_reused: int = 0
    bytes_packed: int = 0
    is_complete: bool = True
    note: str = ""


def upload_file(
    to: StreamOpener | Carrier,
    local: Path | Source,
    manifest: ChunkManifest,
    *,
    on_progress: ProgressListener | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    streams: StreamPolicy | None = None,
    packing: bool = True,
    rates: PackingRates | None = None,
    order: Sequence[int] | None = None,
    draft: Draft | None = None,
    retry: ReconnectPolicy | None = None,
    on_reconnect: ReconnectListener | None = None,
    wait_s: float = 90.0,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    run_id: str = "",
    store_limit_bytes: int | None = None,
) -> UploadResult:
    """Put `local` into the node's store, verified, and return where it stands. A `Source` is closed at the end.

    `to`: the node, or what carries several files to it, whose limits hold then and whose streams are left to the next.
    `packing`: floats go in fewer bytes where the link is slower than that takes, which `rates`, if given, comes to
    tell. `order` holds the chunks' indices in the order in which they go; where it lacks some, these are not sent, and
    jobs may read the others out of the part that is kept of the file. `draft`: what went of the file before its digest
    was known, which ends here; its limits hold on. `run_id`: the run that needs the file, if one
    does; the store is kept under `store_limit_bytes`. Raises
    `LocalFileChangedError`, `IntegrityError` (chunks arrive damaged again and again), `NoSpaceError`, `NodeUnfitError`
    (permission), `LockedError` (another upload of the same file holds it and has not got on for `wait_s`), and the
    `UnreachableError` family once `retry` is exhausted. Whatever arrived before any of them is kept on the node.
    """
    if len(manifest.chunks) > MAX_CHUNKS:
        raise UsageError(f"{local} has {len(manifest.chunks)} chunks, {MAX_CHUNKS} are the limit")
    if order is not None and (len(set(order)) != len(order) or not set(order) <= set(range(len(manifest.chunks)))):
        raise UsageError("the order of chunks names one twice, or one that is not there")
    begun = time.monotonic()
    file = LocalFile(local) if isinstance(local, Path) else local
    with contextlib.ExitStack() as at_end:
        at_end.callback(file.close)
        if draft is not None:
            at_end.callback(draft.close)
            draft.end()
            carrier = draft.carrier
        elif isinstance(to, Carrier):
            carrier = to
        else:
            carrier = Carrier(
                to,
                bandwidth_limit_bytes_per_s=bandwidth_limit_bytes_per_s,
                streams=streams,
                packing=packing,
                rates=rates,
                retry=retry,
                idle_timeout_s=idle_timeout_s,
            )
            at_end.callback(carrier.close)
        opener = carrier.opener
        request = ReceiveRequest(
            opener.layout.root,
            manifest.digest,
            manifest.size,
            len(manifest.chunks),
            secrets.token_hex(16),
            wait_s,
            carrier.idle_timeout_s,
            run_id,
            store_limit_bytes,
            adopts=draft.digest if draft is not None else "",
        )
        upload = _Upload(carrier, file, manifest, request, order, draft, on_progress)
        if carrier is not to:
            carrier.expect(upload.total_bytes)
        finished = with_reconnects(opener, upload.attempt, lambda: upload.durable_bytes, carrier.retry, on_reconnect)
    path = opener.layout.checkpoint(manifest.digest)
    if (finished.path, finished.digest, finished.size) != (path, manifest.digest, manifest.size):
        raise IntegrityError(f"the node put the file at {finished.path!r}, not at {path!r}")
    upload.report_done()
    seconds = time.monotonic() - begun
    return UploadResult(
        finished.path,
        upload.sent.bytes_sent,
        upload.bytes_saved or 0,
        seconds,
        tuple(upload.sent.facts),
        min(upload.bytes_reused, upload.bytes_saved or 0),
        upload.sent.bytes_packed,
        isinstance(finished, FinishedFacts),
        upload.sent.note,
    )


class _Upload:
    """One file's way to the node, through as many connections as it takes."""

    def __init__(
        self,
        carrier: Carrier,
        file: Source,
        manifest: ChunkManifest,
        request: ReceiveRequest,
        order: Sequence[int] | None,
        draft: Draft | None,
        on_progress: ProgressListener | None,
    ) -> None:
        self.bytes_reused = draft.bytes_reused if draft is not None else 0
        self.bytes_saved: int | None = None
        self.durable_bytes = 0
        self.sent = draft.sent if draft is not None else Sent()
        self._bytes_of_draft = draft.bytes_arrived if draft is not None else 0
        self._carrier = carrier
        self._file = file
        self._packed = pack_chunks(manifest.chunks)
        self._table = ChunkTable(self._packed, manifest.size)
        self._request = request
        named = range(len(self._table)) if order is None else order
        self._order = _first_of_each(named, self._table)
        self._kept = _flagged(named, len(self._table)) if len(named) < len(self._table) else None
        self.total_bytes = sum(map(self._table.length, named))
        self._meter = ProgressMeter(self.total_bytes)
        self._on_progress = on_progress
        self._most_moved = self._bytes_of_draft
        self._lock = threading.Lock()
        self._has_begun = False

    def attempt(self) -> Outcome:
        """Send what is missing and finish the file, or have it kept. Raises when no stream is left, or one met what no
        other would survive either."""
        flight = Flight(self._table, self._order)
        sender = Sender(
            self._file,
            self._packed,
            self._table,
            flight,
            self._carrier,
            self.sent,
            self._see_have,
            self._add_reused,
            self._kept,
        )
        self._has_begun = False
        self._carrier.carry(
            self._request,
            flight,
            sender.serve,
            self.sent,
            has_begun=lambda: self._has_begun,
            is_over=lambda: sender.finished is not None,
            on_tick=lambda streams: self._report_flight(flight, streams),
        )
        if self.bytes_saved is None:
            self.bytes_saved = self.total_bytes
        if sender.finished is None:
            raise InternalError("an upload was over before its file was finished")
        return sender.finished

    def report_done(self) -> None:
        self._report(self.total_bytes - (self.bytes_saved or 0), 0)

    def _see_have(self, have: bytearray) -> None:
        """Take in what the node has, as its first stream of this attempt tells."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
            sent = (index for index in self._order if not have[index])
            # What the file repeats comes with the one of its kind that is sent.
            self.durable_bytes = self.total_bytes - sum(self._table.length(index) for index in sent)
            if self.bytes_saved is None:
                self.bytes_saved = max(0, self.durable_bytes - self._bytes_of_draft)

    def _add_reused(self, count: int) -> None:
        with self._lock:
            self.bytes_reused += count

    def _report_flight(self, flight: Flight, streams: int) -> None:
        self._report(self.durable_bytes + flight.arrived_bytes - (self.bytes_saved or 0), streams)

    def _report(self, bytes_moved: int, streams: int) -> None:
        """What a cut took back is not told as a step back: it comes again before anything new does."""
        self._most_moved = max(self._most_moved, min(bytes_moved, self.total_bytes - (self.bytes_saved or 0)))
        if self._on_progress is not None:
            saved = self.bytes_saved or 0
            reused = min(self.bytes_reused, saved)
            progress = self._meter.measure(
                self._most_moved, saved, streams, bytes_reused=reused, bytes_packed=self.sent.bytes_packed
            )
            self._on_progress(progress)


def _flagged(indices: Sequence[int], count: int) -> bytearray:
    flags = bytearray(count)
    for index in indices:
        flags[index] = 1
    return flags


def _first_of_each(order: Sequence[int], table: ChunkTable) -> list[int]:
    """The order without chunks that repeat an earlier one."""
    first: dict[bytes, int] = {}
    for index in order:
        first.setdefault(table.sha256(index), index)
    return list(first.values())
