"""Fetching files from a node: verified spans into a hidden partial file beside the target, renamed when it is whole.

Many files share one stream, and wants run ahead of the answers. A fetch that was cut goes on behind what its partial
file holds.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.errors import IntegrityError
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectListener,
    ReconnectPolicy,
    StreamDamagedError,
    StreamOpener,
    with_reconnects,
)
from orchestrator.transfer.landing import Landing
from orchestrator.transfer.progress import ProgressListener, ProgressMeter, TokenBucket
from remote_payload.wire.names import check_sha256, printable
from remote_payload.wire.stream import MAX_DATA_BYTES, FrameKind, SendRequest, SpanEnd, SpanFacts, Want

SPAN_BYTES = 16 * 1024 * 1024
MAX_WANTS_AHEAD = 32
MAX_BYTES_AHEAD = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Download:
    """One file to fetch: the absolute `path` on the node to `target` here.

    Its `size` and `sha256` are checked where they are known. `may_grow`: a log that is still being written; what it
    held when it was first looked at is fetched.
    """

    path: str
    target: Path
    size: int | None = None
    sha256: str | None = None
    may_grow: bool = False

    def __post_init__(self) -> None:
        if self.sha256 is not None:
            check_sha256(self.sha256)
            if self.size is None:
                raise ValueError("a file of known SHA-256 has a known size")


@dataclasses.dataclass(frozen=True)
class DownloadResult:
    """`bytes_received` counts file data that came over the stream; the rest of the files was here already."""

    bytes_total: int
    bytes_received: int
    seconds: float


def download_files(
    opener: StreamOpener,
    downloads: Sequence[Download],
    *,
    on_progress: ProgressListener | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    retry: ReconnectPolicy | None = None,
    on_reconnect: ReconnectListener | None = None,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> DownloadResult:
    """Fetch files over one stream, each in place only when it is whole and verified. Their folders must exist.

    Raises `IntegrityError` (size, digest, or changed while it was fetched), `UsageError` (no such file there; cannot
    write here), `LockedError` (another fetch to the same target), and the `UnreachableError` family once `retry` is
    exhausted. The first failure ends it; files already in place stay, and partial ones are gone on with next time.
    """
    begun = time.monotonic()
    files = [_File(download) for download in downloads]
    fetch = _Fetch(opener, files, on_progress, TokenBucket(bandwidth_limit_bytes_per_s), idle_timeout_s)
    try:
        with_reconnects(opener, fetch.attempt, fetch.durable_bytes, retry or ReconnectPolicy(), on_reconnect)
    finally:
        for file in files:
            file.close()
    return DownloadResult(fetch.durable_bytes(), fetch.bytes_received, time.monotonic() - begun)


class _File:
    """One file of a fetch: what is wanted, what the node said it is, and where it lands."""

    def __init__(self, download: Download) -> None:
        self.download = download
        self.size = download.size
        self.landing: Landing | None = None
        self._first_seen: SpanFacts | None = None

    @property
    def verified_bytes(self) -> int:
        return self.landing.verified_bytes if self.landing else 0

    @property
    def is_done(self) -> bool:
        return self.landing is not None and self.landing.is_done

    def want(self, offset: int, length: int, *, digest_only: bool = False) -> Want:
        return Want(self.download.path, offset, length, digest_only, self.download.may_grow)

    def open(self) -> Landing:
        """The landing, opened. Only once the size is known."""
        if self.landing is None:
            if self.size is None:
                raise ValueError("the file's size is not known")
            landing = Landing(self.download.target, self.size, self.download.sha256, self.download.path)
            landing.open()
            if self.download.may_grow:
                landing.forget_rest()
            self.landing = landing
        return self.landing

    def look_again(self) -> None:
        """Forget what the node said of a file that may grow, as long as nothing of it is here."""
        if self.download.may_grow and not self.is_done and self.verified_bytes == 0:
            self.close()
            self.landing, self._first_seen, self.size = None, None, self.download.size

    def close(self) -> None:
        if self.landing is not None:
            self.landing.close()

    def see(self, facts: SpanFacts, want: Want) -> None:
        """Compare what the node says of the file now with what was promised, and with what it said before."""
        if self.size is None:
            self.size = facts.size
        if self._first_seen is None:
            self._first_seen = facts
        first = self._first_seen
        grown = facts.size - self.size
        is_rewritten = facts.inode != first.inode or (facts.mtime_ns != first.mtime_ns and not self.download.may_grow)
        # Where a SHA-256 was promised it decides; touching the file does no harm.
        is_other = is_rewritten and self.download.sha256 is None
        if is_other or grown < 0 or (grown and not self.download.may_grow):
            name = printable(self.download.path)
            raise IntegrityError(
                f"{name} has {facts.size} bytes, not {self.size}" if grown else f"{name} changed while it was fetched",
                action="Fetch it again when it is complete.",
            )
        if (facts.offset, facts.length) != (want.offset, min(want.length, facts.size - want.offset)):
            raise StreamDamagedError("the node sends another span than was asked for")


class _Fetch:
    """The files of one call, through as many streams as it takes."""

    def __init__(
        self,
        opener: StreamOpener,
        files: list[_File],
        on_progress: ProgressListener | None,
        bucket: TokenBucket,
        idle_timeout_s: float,
    ) -> None:
        self.bytes_received = 0
        self._saved_bytes = 0
        self._opener = opener
        self._files = files
        self._on_progress = on_progress
        self._bucket = bucket
        self._idle_timeout_s = idle_timeout_s
        self._meter: ProgressMeter | None = None
        self._buffer = memoryview(bytearray(MAX_DATA_BYTES))

    def durable_bytes(self) -> int:
        return sum(file.verified_bytes for file in self._files)

    def attempt(self) -> None:
        """Fetch what is missing over one new stream."""
        request = SendRequest(self._opener.layout.root, self._idle_timeout_s)
        left = sum(max(0, (file.size or 0) - file.verified_bytes) for file in self._files)
        stream = self._opener.open_agent_stream(
            "send", request, idle_timeout_s=self._idle_timeout_s, expected_bytes=left
        )
        with stream:
            channel = FrameChannel(stream)
            for file in self._files:
                file.look_again()
                if file.download.sha256 is None and file.landing is None:
                    self._take_up(channel, file)
            if self._meter is None:
                self._meter = ProgressMeter(sum(file.size or 0 for file in self._files))
            self._fetch(channel)

    def _take_up(self, channel: FrameChannel, file: _File) -> None:
        """Learn a file's size, and compare what an earlier fetch left of it with what the node has.

        The first span of what may grow comes with its size, so that a small file that is replaced all the time, such as
        a truth file, is seen at one instant.
        """
        first = file.want(0, SPAN_BYTES if file.download.may_grow else 0)
        channel.send_json(FrameKind.WANT, first)
        self._take_span(channel, file, first)
        if file.download.may_grow:
            self._finish_if_whole(file)
            return
        landing = file.open()
        held = min(landing.held_bytes(), landing.size)
        while landing.verified_bytes < held:
            offset = landing.verified_bytes
            want = file.want(offset, min(SPAN_BYTES, held - offset), digest_only=True)
            channel.send_json(FrameKind.WANT, want)
            if self._take_span(channel, file, want) != landing.digest_held(offset, want.length):
                break
            landing.take_up_span(offset, want.length)
        self._saved_bytes += landing.verified_bytes

    def _fetch(self, channel: FrameChannel) -> None:
        wants = self._missing()
        due: collections.deque[tuple[_File, Want]] = collections.deque()
        ahead_bytes, has_more = 0, True
        while has_more or due:
            while has_more and len(due) < MAX_WANTS_AHEAD and ahead_bytes < MAX_BYTES_AHEAD:
                following = next(wants, None)
                if following is None:
                    has_more = False
                    break
                channel.send_json(FrameKind.WANT, following[1])
                due.append(following)
                ahead_bytes += following[1].length
            if due:
                file, want = due.popleft()
                ahead_bytes -= want.length
                self._take_span(channel, file, want)
                self._finish_if_whole(file)

    def _missing(self) -> Iterator[tuple[_File, Want]]:
        """Every span that is missing, in order. A file is opened when its first span is about to be asked for."""
        for file in self._files:
            is_new = file.landing is None
            landing = file.open()
            if is_new:
                self._saved_bytes += landing.verified_bytes
            if landing.is_done:
                self._report(file)
                continue
            landing.forget_rest()
            offset = landing.verified_bytes
            if offset == landing.size:
                yield file, file.want(offset, 0)
            while offset < landing.size:
                length = min(SPAN_BYTES, landing.size - offset)
                yield file, file.want(offset, length)
                offset += length

    def _take_span(self, channel: FrameChannel, file: _File, want: Want) -> str:
        """Take in the answer to one want, and return its SHA-256. Data goes to the landing as far as it verifies."""
        _, body = channel.receive(FrameKind.SPAN)
        facts = channel.decode(SpanFacts, body)
        file.see(facts, want)
        span = hashlib.sha256()
        if want.length == 0 or want.digest_only:
            return self._take_end(channel)
        landing = file.open()
        whole = landing.digest_so_far()
        offset, end = want.offset, want.offset + facts.length
        while offset < end:
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != offset or not 0 < header.length <= end - offset:
                raise StreamDamagedError("data that was not asked for arrived")
            view = self._buffer[: header.length]
            self._bucket.take(header.length)
            channel.read_data(view)
            span.update(view)
            whole.update(view)
            landing.write(offset, view)
            offset += header.length
            self.bytes_received += header.length
        sha256 = self._take_end(channel)
        if span.hexdigest() != sha256:
            raise StreamDamagedError("a span arrived damaged")
        landing.commit(facts.length, whole)
        self._report(file)
        return sha256

    def _take_end(self, channel: FrameChannel) -> str:
        _, body = channel.receive(FrameKind.END)
        return channel.decode(SpanEnd, body).sha256

    def _finish_if_whole(self, file: _File) -> None:
        landing = file.open()
        if landing.verified_bytes == landing.size and not landing.finish():
            raise StreamDamagedError(f"what was here already of {landing.target.name} was damaged, and is dropped")

    def _report(self, file: _File) -> None:
        if self._on_progress is not None and self._meter is not None and file.landing is not None:
            moved = max(self.durable_bytes() - self._saved_bytes, 0)
            self._on_progress(self._meter.measure(moved, self._saved_bytes))
