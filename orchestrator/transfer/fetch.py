"""Fetching a file of any size from a node: spans from one queue over several streams, through any cuts.

Every span carries the node's SHA-256 of it. What has arrived is journalled here, so that a fetch which was cut, or
killed, reads and fetches nothing again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from pathlib import Path

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectListener,
    ReconnectPolicy,
    StreamDamagedError,
    StreamOpener,
    with_reconnects,
)
from orchestrator.transfer.packing import Unpacker
from orchestrator.transfer.partial import SpanFile, sha256_of
from orchestrator.transfer.progress import ProgressListener, ProgressMeter
from orchestrator.transfer.stream_count import StreamPolicy
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.names import printable
from remote_payload.wire.packing_rates import MIN_BYTES
from remote_payload.wire.stream import (
    MAX_DATA_BYTES,
    PACKED_ENCODING,
    FrameKind,
    SendRequest,
    SpanEnd,
    SpanFacts,
    Want,
)

SPAN_BYTES = 8 * 1024 * 1024
WANTS_AHEAD = 4
_FIRST_WANTS_AHEAD = 2
"""Until the link is measured: what is asked for by then comes as it is."""
PIECE_BYTES = 1024 * 1024
MAX_FILE_BYTES = 1 << 44
_TICK_S = 0.2
_WAIT_S = 600.0
_SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class FetchResult:
    """`how` is fetched, or unchanged where the target had the file already. `bytes_saved` were here from before;
    `bytes_packed` is what packing took off what was received."""

    target: Path
    how: str
    bytes_total: int
    bytes_received: int
    bytes_saved: int
    seconds: float
    bytes_packed: int = 0


def fetch_file(
    node: StreamOpener | Carrier,
    path: str,
    listed: ListedFile,
    target: Path,
    *,
    overwrite: bool = False,
    sha256: str | None = None,
    streams: StreamPolicy | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    packing: bool = True,
    on_progress: ProgressListener | None = None,
    retry: ReconnectPolicy | None = None,
    on_reconnect: ReconnectListener | None = None,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> FetchResult:
    """Bring the file at the absolute `path` on the node, as it was `listed`, to `target`, whose folder exists.

    `node`: or what carries several files from it, whose limits hold then and whose streams are left to the next.
    `sha256`: what the whole must have. `packing`: floats come in fewer bytes where the link is slower than that takes.
    Raises `UsageError` (another file is at the target and `overwrite` is not set; this disk refuses), `IntegrityError`
    (it changed on the node, or is not what `sha256` says), `LockedError`, and the `UnreachableError` family once
    `retry` is exhausted. What arrived before any of them is kept.
    """
    if not 0 <= listed.size <= MAX_FILE_BYTES:
        raise IntegrityError(f"the node says that {printable(path)} has {listed.size} bytes")
    began = time.monotonic()

    def new_carrier(opener: StreamOpener) -> Carrier:
        return Carrier(
            opener,
            bandwidth_limit_bytes_per_s=bandwidth_limit_bytes_per_s,
            streams=streams,
            packing=False,
            retry=retry,
            idle_timeout_s=idle_timeout_s,
        )

    if target.is_symlink() or target.exists():
        if _is_known(target, listed.size, sha256):
            return FetchResult(target, "unchanged", listed.size, 0, listed.size, time.monotonic() - began)
        # Digests take no login: none of the streams that are for the files themselves.
        with new_carrier(node.opener if isinstance(node, Carrier) else node) as carrier:
            is_the_same = sha256 is None and _is_the_same(
                _Work(carrier, path, listed, packing, None), target, on_reconnect
            )
        if is_the_same:
            return FetchResult(target, "unchanged", listed.size, 0, listed.size, time.monotonic() - began)
        if not overwrite:
            raise UsageError(f"another file is at {target}", action="Name another place, or overwrite it with --force.")
        if target.is_dir():
            raise UsageError(f"{target} is a folder", action="Name another place.")
    identity = json.dumps([path, listed.size, listed.mtime_ns, listed.inode, SPAN_BYTES])
    file = SpanFile(target, identity, span_count(listed.size))

    def bring(carrier: Carrier) -> tuple[_Work, int]:
        work = _Work(carrier, path, listed, packing, on_progress)
        saved = work.begin(file)
        if carrier is not node:
            carrier.expect(listed.size - saved)
        with_reconnects(carrier.opener, work.attempt, lambda: work.done_bytes, carrier.retry, on_reconnect)
        return work, saved

    with contextlib.ExitStack() as at_end:
        at_end.callback(file.close)
        carrier = node if isinstance(node, Carrier) else at_end.enter_context(new_carrier(node))
        work, saved = bring(carrier)
        while sha256 is not None and file.sha256() != sha256:
            file.start_over()
            if not saved:
                raise IntegrityError(
                    f"{printable(path)} is not what the node's manifest says: another SHA-256",
                    action="It changed after that was written, or the node's disk is damaged: look at it there.",
                )
            # What an earlier fetch had left here may be what is damaged.
            work, saved = bring(carrier)
        file.finish(listed.mtime_ns)
    seconds = time.monotonic() - began
    return FetchResult(target, "fetched", listed.size, work.bytes_received, saved, seconds, work.bytes_packed)


def span_count(size: int) -> int:
    return -(-size // SPAN_BYTES)


class _Work:
    """The spans of one file: which are to come, which are on their way, and the streams that carry them.

    With a `file`, spans are fetched into it; without one, only their digests are, into `digests`.
    """

    def __init__(
        self,
        carrier: Carrier,
        path: str,
        listed: ListedFile,
        packing: bool,
        on_progress: ProgressListener | None,
    ) -> None:
        self.bytes_received = 0
        self.bytes_packed = 0
        self.done_bytes = 0
        self.digests: dict[int, str] = {}
        self.carrier = carrier
        self.listed = listed
        self._path = path
        self._packing = packing
        self._rates = carrier.rates
        self._unpacker = Unpacker(self._rates)
        self._on_progress = on_progress
        self._file: SpanFile | None = None
        self._changed = threading.Condition()
        self._queue: collections.deque[int] = collections.deque()
        self._missing = 0
        self._allowed = 1
        self._working = 0
        self._saved = 0
        self._meter = ProgressMeter(listed.size)

    def begin(self, file: SpanFile | None, spans: list[int] | None = None) -> int:
        """Plan what `file` lacks, or `spans`; returns how many bytes need no fetching."""
        wanted = range(span_count(self.listed.size)) if spans is None else spans
        self._file = file
        self._queue = collections.deque(index for index in wanted if file is None or not file.here[index])
        self._missing = len(self._queue)
        self.done_bytes = self._saved = self.listed.size - sum(self.length_of(index) for index in self._queue)
        return self._saved

    def attempt(self) -> None:
        """Fetch what is missing over new streams. Raises when none is left, or one met what no other would survive."""
        carrier, pool, count = self.carrier, self.carrier.pool, self.carrier.count
        request = SendRequest(carrier.opener.layout.root, carrier.idle_timeout_s)
        count.disregard()
        with pool.work("send", request, self._serve, self._wake):
            while self._missing:
                now = time.monotonic()
                wanted = count.observe(now, self.done_bytes - self._saved, pool.open_count)
                with self._changed:
                    self._allowed = wanted
                    has_work = bool(self._queue)
                if has_work:
                    pool.open_up_to(wanted)
                with self._changed:
                    if self._missing:
                        self._changed.wait(_TICK_S)
                self._report(pool.open_count)
                for end in pool.ended():
                    if self._missing:
                        carrier.was_lost(end)
        self._report(0)

    def _serve(self, stream: ByteStream) -> None:
        self.carrier.learn(stream)
        channel = FrameChannel(stream)
        buffer = memoryview(bytearray(min(MAX_DATA_BYTES, max(1, self.listed.size))))
        due: collections.deque[int] = collections.deque()
        with self._changed:
            self._working += 1
        try:
            while True:
                ahead = WANTS_AHEAD if self._rates.knows_link else _FIRST_WANTS_AHEAD
                while len(due) < ahead and (index := self._take(may_wait=not due)) is not None:
                    due.append(index)
                    channel.send_json(FrameKind.WANT, self._want(index))
                if not due:
                    channel.send(FrameKind.LEAVE)
                    return
                self._receive(channel, due[0], buffer)
                due.popleft()
        finally:
            with self._changed:
                self._working -= 1
                self._queue.extendleft(reversed(due))
                self._changed.notify_all()

    def _take(self, *, may_wait: bool) -> int | None:
        """The next span; None where there is none now, or, after waiting, none will come or this stream retires."""
        deadline = time.monotonic() + _WAIT_S
        with self._changed:
            while self._missing and self._working <= self._allowed:
                if self._queue:
                    return self._queue.popleft()
                # Spans of another stream come back if it is lost.
                if not may_wait or not self._changed.wait(deadline - time.monotonic()):
                    return None
            return None

    def _want(self, index: int) -> Want:
        length = self.length_of(index)
        if self._file is None:
            return Want(self._path, index * SPAN_BYTES, length, digest_only=True)
        # Each stream's agent packs by itself, beside its sending.
        may_pack = self._packing and length >= MIN_BYTES and self._rates.pays(self._working)
        if may_pack:
            self._rates.note_tried()
        return Want(self._path, index * SPAN_BYTES, length, may_pack=may_pack)

    def _receive(self, channel: FrameChannel, index: int, buffer: memoryview) -> None:
        """Take in the answer to the want of one span."""
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed, start, length = self.listed, index * SPAN_BYTES, self.length_of(index)
        if (facts.size, facts.mtime_ns, facts.inode) != (listed.size, listed.mtime_ns, listed.inode):
            raise IntegrityError(
                f"{printable(self._path)} changed while it was fetched", action="Fetch it again when it is complete."
            )
        if (facts.offset, facts.length) != (start, length):
            raise StreamDamagedError("the node sends another span than was asked for")
        digest, offset, end, received = hashlib.sha256(), start, start + length, 0
        while self._file is not None and offset < end:
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != offset or not 0 < header.length <= end - offset:
                raise StreamDamagedError("data that was not asked for arrived")
            body = buffer[: header.length]
            self._read(channel, body)
            is_packed = header.encoding == PACKED_ENCODING
            # A packed body stands for all that is left of the span.
            with self._unpacker.unpacked(body, end - offset) if is_packed else contextlib.nullcontext(body) as data:
                digest.update(data)
                self._file.write(offset, data)
                offset += len(data)
            received += header.length
        answer = channel.decode(SpanEnd, channel.receive(FrameKind.END)[1])
        if self._file is not None:
            if digest.hexdigest() != answer.sha256:
                raise StreamDamagedError("a span arrived damaged")
            self._file.commit(index, length)
        if answer.packing_s > 0:
            self._rates.note_packed(length, answer.packing_s)
        with self._changed:
            self.digests[index] = answer.sha256
            self.done_bytes += length
            self.bytes_received += received
            self.bytes_packed += length - received if self._file is not None else 0
            self._missing -= 1
            self._changed.notify_all()

    def _read(self, channel: FrameChannel, view: memoryview) -> None:
        """Fill `view` from a DATA frame's body, as fast as the limit allows."""
        with self._rates.moving():
            while view:
                piece = view[: self.carrier.bucket.piece_bytes(PIECE_BYTES)]
                self.carrier.bucket.take(len(piece))
                channel.read_data(piece)
                self._rates.note_moved(len(piece))
                view = view[len(piece) :]

    def length_of(self, index: int) -> int:
        return min(SPAN_BYTES, self.listed.size - index * SPAN_BYTES)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _report(self, streams: int) -> None:
        if self._on_progress is not None and self._file is not None:
            moved = self.done_bytes - self._saved
            self._on_progress(self._meter.measure(moved, self._saved, streams, bytes_packed=self.bytes_packed))


def _is_known(target: Path, size: int, sha256: str | None) -> bool:
    """Whether the target has the SHA-256 that is promised."""
    if sha256 is None or target.is_symlink() or not target.is_file() or target.stat().st_size != size:
        return False
    try:
        return sha256_of(target) == sha256
    except OSError as error:
        raise UsageError(f"{target} cannot be read: {error.strerror}") from error


def _is_the_same(work: _Work, target: Path, on_reconnect: ReconnectListener | None) -> bool:
    """Whether the target has the node's content: by a sample where size and time stamp agree, else by every span."""
    listed = work.listed
    if target.is_symlink() or not target.is_file() or target.stat().st_size != listed.size:
        return False
    spans = list(range(span_count(listed.size)))
    if target.stat().st_mtime_ns == listed.mtime_ns:
        step = max(1, len(spans) // _SAMPLES)
        spans = sorted({*spans[::step], *spans[-1:]})
    work.begin(None, spans)
    carrier = work.carrier
    with_reconnects(carrier.opener, work.attempt, lambda: work.done_bytes, carrier.retry, on_reconnect)
    try:
        with target.open("rb") as file:
            for index in spans:
                file.seek(index * SPAN_BYTES)
                if hashlib.sha256(file.read(work.length_of(index))).hexdigest() != work.digests[index]:
                    return False
    except OSError as error:
        raise UsageError(f"{target} cannot be read: {error.strerror}") from error
    return True
