"""Sending a file into a node's store: the chunks that are missing there, over one stream, through any number of cuts.

The node's journal says what is there; nothing is read again on either side. The sender runs ahead of the
acknowledgements by a bounded window, and a thread takes them in.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import secrets
import time
from pathlib import Path

from orchestrator.errors import IntegrityError, UnreachableError, UsageError
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectListener,
    ReconnectPolicy,
    StreamDamagedError,
    StreamOpener,
    with_reconnects,
)
from orchestrator.transfer.flight import Flight, bitmap
from orchestrator.transfer.progress import ProgressListener, ProgressMeter, TokenBucket
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.stream import (
    MAX_CHUNKS,
    ChunkTable,
    FinishedFacts,
    FrameKind,
    ReceiveRequest,
    manifest_pages,
    pack_chunks,
)

PIECE_BYTES = 1024 * 1024
_MAX_FINISH_ROUNDS = 8
_LAST_WORDS_S = 5.0


class LocalFileChangedError(IntegrityError):
    """The local file is no longer what its manifest says."""


@dataclasses.dataclass(frozen=True)
class UploadResult:
    """`bytes_sent` counts file data including what was sent twice; `bytes_saved` is what the node had at the start."""

    path_on_node: str
    bytes_sent: int
    bytes_saved: int
    seconds: float


def upload_file(
    opener: StreamOpener,
    local: Path,
    manifest: ChunkManifest,
    *,
    on_progress: ProgressListener | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    retry: ReconnectPolicy | None = None,
    on_reconnect: ReconnectListener | None = None,
    wait_s: float = 90.0,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> UploadResult:
    """Put `local` into the node's store, verified, and return where it stands.

    Raises `LocalFileChangedError`, `IntegrityError` (chunks arrive damaged again and again), `NodeUnfitError` (space,
    quota, permission), `LockedError` (another upload of the same file holds it and has not got on for `wait_s`), and
    the `UnreachableError` family once `retry` is exhausted. Whatever arrived before any of them is kept on the node.
    """
    if len(manifest.chunks) > MAX_CHUNKS:
        raise UsageError(f"{local} has {len(manifest.chunks)} chunks, {MAX_CHUNKS} are the limit")
    begun = time.monotonic()
    try:
        fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot open {local}: {error.strerror}") from error
    try:
        request = ReceiveRequest(
            opener.layout.root,
            manifest.digest,
            manifest.size,
            len(manifest.chunks),
            secrets.token_hex(16),
            wait_s,
            idle_timeout_s,
        )
        bucket = TokenBucket(bandwidth_limit_bytes_per_s)
        upload = _Upload(opener, fd, local, manifest, request, bucket, on_progress)
        finished = with_reconnects(
            opener, upload.attempt, lambda: upload.durable_bytes, retry or ReconnectPolicy(), on_reconnect
        )
    finally:
        os.close(fd)
    expected = FinishedFacts(opener.layout.checkpoint(manifest.digest), manifest.digest, manifest.size)
    if finished != expected:
        raise IntegrityError(f"the node put the file at {finished.path!r}, not at {expected.path!r}")
    upload.report_done()
    return UploadResult(finished.path, upload.bytes_sent, upload.bytes_saved or 0, time.monotonic() - begun)


class _Upload:
    """One file's way to the node over as many streams, one after the other, as it takes."""

    def __init__(
        self,
        opener: StreamOpener,
        fd: int,
        local: Path,
        manifest: ChunkManifest,
        request: ReceiveRequest,
        bucket: TokenBucket,
        on_progress: ProgressListener | None,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_saved: int | None = None
        self.durable_bytes = 0
        self._opener = opener
        self._fd = fd
        self._local = local
        self._packed = pack_chunks(manifest.chunks)
        self._table = ChunkTable(self._packed, manifest.size)
        self._request = request
        self._bucket = bucket
        self._meter = ProgressMeter(manifest.size)
        self._on_progress = on_progress

    def attempt(self) -> FinishedFacts:
        """Send what is missing over one new stream, and finish the file."""
        idle_s = self._request.idle_s
        stream = self._opener.open_agent_stream("receive", self._request, idle_timeout_s=idle_s)
        threads = concurrent.futures.ThreadPoolExecutor(1, "upload-acks")
        try:
            channel = FrameChannel(stream)
            have = self._begin(channel)
            if isinstance(have, FinishedFacts):
                return have
            flight = Flight(channel, self._table, have)
            answers = threads.submit(flight.take_answers)
            answers.add_done_callback(lambda _: flight.wake())
            try:
                return self._fly(channel, flight, answers)
            except UnreachableError:
                # Why the agent left may be among its last words, which came before the end that we ran into.
                concurrent.futures.wait([answers], timeout=_LAST_WORDS_S)
                if answers.done():
                    answers.result()
                raise
        finally:
            stream.close()
            threads.shutdown(wait=True)

    def report_done(self) -> None:
        self._report(self._table.size - (self.bytes_saved or 0))

    def _fly(self, channel: FrameChannel, flight: Flight, answers: concurrent.futures.Future[None]) -> FinishedFacts:
        for _ in range(_MAX_FINISH_ROUNDS):
            while (index := flight.next_chunk(answers, self._report_flight)) is not None:
                self._send_chunk(channel, index, is_again=flight.was_refused(index))
            channel.send(FrameKind.FINISH)
            answer = flight.await_answer(answers)
            if isinstance(answer, FinishedFacts):
                return answer
            flight.send_missing(answer)
        raise StreamDamagedError("the node acknowledged chunks and then did not have them")

    def _begin(self, channel: FrameChannel) -> bytearray | FinishedFacts:
        try:
            for first, page in manifest_pages(self._packed):
                channel.send(FrameKind.MANIFEST, first, page)
        except UnreachableError:
            self._await_have(channel)  # raises the agent's reason for leaving, if it gave one
            raise
        return self._await_have(channel)

    def _await_have(self, channel: FrameChannel) -> bytearray | FinishedFacts:
        while True:
            header, body = channel.receive(FrameKind.WAITING, FrameKind.HAVE, FrameKind.FINISHED)
            if header.kind is FrameKind.WAITING:
                self._report(0)
                continue
            if header.kind is FrameKind.FINISHED:
                if self.bytes_saved is None:
                    self.bytes_saved = self._table.size
                return channel.decode(FinishedFacts, body)
            have = bitmap(body, len(self._table))
            self.durable_bytes = sum(self._table.length(i) for i, is_there in enumerate(have) if is_there)
            if self.bytes_saved is None:
                self.bytes_saved = self.durable_bytes
            return have

    def _send_chunk(self, channel: FrameChannel, index: int, *, is_again: bool) -> None:
        offset, left = self._table.offset(index), self._table.length(index)
        if is_again:
            self._check_unchanged(index)
        channel.send_data_header(index, left)
        while left:
            data = self._read(offset, min(left, self._bucket.piece_bytes(PIECE_BYTES)))
            self._bucket.take(len(data))
            channel.send_data(data)
            self.bytes_sent += len(data)
            offset, left = offset + len(data), left - len(data)

    def _check_unchanged(self, index: int) -> None:
        """A refused chunk is either damaged on its way or no longer what the manifest says: look which."""
        digest = hashlib.sha256()
        offset, left = self._table.offset(index), self._table.length(index)
        while left:
            data = self._read(offset, min(left, PIECE_BYTES))
            digest.update(data)
            offset, left = offset + len(data), left - len(data)
        if digest.digest() != self._table.sha256(index):
            raise self._changed()

    def _read(self, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._fd, count, offset)
        except OSError as error:
            raise UsageError(f"cannot read {self._local}: {error.strerror}") from error
        if not data:
            raise self._changed()
        return data

    def _changed(self) -> LocalFileChangedError:
        return LocalFileChangedError(
            f"{self._local} changed while it was being sent",
            action="Wait until it is written completely, or evaluate a copy of it; then run this again.",
        )

    def _report_flight(self, bytes_arrived: int) -> None:
        self._report(self.durable_bytes + bytes_arrived - (self.bytes_saved or 0))

    def _report(self, bytes_moved: int) -> None:
        if self._on_progress is not None:
            self._on_progress(self._meter.measure(max(bytes_moved, 0), self.bytes_saved or 0))
