"""One stream of an upload: the manifest, chunks from the shared flight, the agent's answers, and the finish."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from orchestrator import standby
from orchestrator.errors import CommandTimeoutError, RemoteEvalError, UnreachableError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.carrier import Carrier, Sent, note_of
from orchestrator.transfer.channel import IDLE_TIMEOUT_S, FrameChannel, StreamDamagedError
from orchestrator.transfer.flight import Flight, Lane, bitmap
from orchestrator.transfer.packing import PackedChunk, Packer
from orchestrator.transfer.source import Source
from remote_payload.wire.chunk_table import ChunkTable, encode_bitmap, manifest_pages
from remote_payload.wire.stream import (
    PACKED_ENCODING,
    RAW_ENCODING,
    FinishedFacts,
    FrameKind,
    KeptFacts,
    LeftFacts,
    ReusedFacts,
)

PIECE_BYTES = 1024 * 1024
_MAX_FINISH_ROUNDS = 8
_LAST_WORDS_S = 5.0
_ANSWERS_END_S = 120.0
"""How long an agent may take to make durable what it acknowledged, before it ends."""
_NEXT_CHUNK_S = 10 * _ANSWERS_END_S
_CHUNKS_AHEAD = 3
"""One that is packed, to be sent next, and two that are being packed meanwhile."""

Outcome = FinishedFacts | KeptFacts
_NEWS = (FrameKind.ACK, FrameKind.REFUSED, FrameKind.COPIED, FrameKind.ALIVE, FrameKind.PACKED, FrameKind.HAVE)
_LAST_ANSWERS: dict[FrameKind, type[Outcome | LeftFacts]] = {
    FrameKind.FINISHED: FinishedFacts,
    FrameKind.KEPT: KeptFacts,
    FrameKind.LEFT: LeftFacts,
}


class Sender:
    """What every stream of one upload does. `serve` runs in a thread for each; the rest is shared by them.

    `kept` None: the whole file is to be finished; else the chunks that are to be kept for now are flagged in it.
    `packed`: the table as MANIFEST frames carry it. `is_given_up` None: no draft; else it tells, once nothing more of
    it goes, whether nobody needs it.
    """

    def __init__(
        self,
        file: Source,
        packed: bytes,
        table: ChunkTable,
        flight: Flight,
        carrier: Carrier,
        sent: Sent,
        on_have: Callable[[bytearray], None],
        on_reused: Callable[[int], None],
        kept: bytearray | None = None,
        is_given_up: Callable[[], bool] | None = None,
    ) -> None:
        self.finished: Outcome | None = None
        self._file = file
        self._packed = packed
        self._table = table
        self._flight = flight
        self._carrier = carrier
        self._sent = sent
        self._on_have = on_have
        self._on_reused = on_reused
        self._kept = kept
        self._is_given_up = is_given_up

    def serve(self, stream: ByteStream) -> None:
        """Carry chunks until none is left or this stream is to retire; its agent is on stand-by then.

        Raises `LocalFileChangedError`, what the agent's FAILURE says, and what the stream raises; it is closed then.
        """
        channel = FrameChannel(stream)
        have = self._begin(channel)
        if isinstance(have, FinishedFacts):
            self.finished = have
            return
        self._on_have(have)
        lane = self._flight.join(have)
        answers = _Answers(channel, self._flight, lane, self._table, self._sent)
        is_on_standby = False
        try:
            self._fly(channel, lane, answers)
            is_on_standby = True
        except UnreachableError as error:
            # Why the agent left may be among its last words, which came before the end that we ran into.
            answers.join(_LAST_WORDS_S)
            if answers.error is not None and not isinstance(answers.error, UnreachableError):
                raise answers.error from error
            raise
        finally:
            self._flight.leave(lane)
            if not is_on_standby:
                stream.close()
            answers.join(_ANSWERS_END_S)

    def _fly(self, channel: FrameChannel, lane: Lane, answers: _Answers) -> None:
        for _ in range(_MAX_FINISH_ROUNDS):
            self._send_chunks(channel, lane)
            if self._is_given_up is not None or not self._flight.is_last(lane):
                self._leave(answers)
                return
            self._flight.await_alone(lane, _ANSWERS_END_S)
            wanted = encode_bitmap(self._kept) if self._kept is not None else b""
            kind = FrameKind.FINISH if self._kept is None else FrameKind.KEEP
            answer = answers.ask(kind, len(self._kept or ()), wanted)
            if isinstance(answer, (FinishedFacts, KeptFacts)):
                self.finished = answer
                return
            if isinstance(answer, LeftFacts):
                break
            self._flight.send_missing(answer)
        raise StreamDamagedError("the node acknowledged chunks and then did not have them")

    def _leave(self, answers: _Answers) -> None:
        """Leave the file to others: the agent makes durable and journals what it acknowledged, and says so."""
        is_given_up = self._is_given_up is not None and self._is_given_up()
        left = answers.ask(FrameKind.LEAVE, int(is_given_up))
        if not isinstance(left, LeftFacts):
            raise StreamDamagedError("the node does not let go of the file")
        self._on_reused(left.bytes_reused)

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
            header, body = channel.receive(FrameKind.WAITING, FrameKind.REUSED, FrameKind.HAVE, FrameKind.FINISHED)
            if header.kind is FrameKind.REUSED:
                facts = channel.decode(ReusedFacts, body)
                self._sent.note = note_of(facts) or self._sent.note
                self._on_reused(facts.bytes_reused)
            if header.kind is FrameKind.FINISHED:
                return channel.decode(FinishedFacts, body)
            if header.kind is FrameKind.HAVE:
                return bitmap(body, len(self._table))

    def _send_chunks(self, channel: FrameChannel, lane: Lane) -> None:
        """Send until the lane has no more to do."""
        if self._carrier.packer is None:
            while (following := self._next_chunk(channel, lane)) is not None:
                self._send_chunk(channel, *following)
            return
        ahead = _Ahead(
            self._carrier.packer, self._flight, lane, self._table, self._file, lambda: self._next_chunk(channel, lane)
        )
        try:
            while self._send_next(channel, ahead):
                pass
        finally:
            ahead.drop()

    def _next_chunk(self, channel: FrameChannel, lane: Lane) -> tuple[int, bool] | None:
        """As `Flight.next_chunk`. A draft may wait for its file to be read, or for the node, and says that it does."""
        if self._is_given_up is None:
            return self._flight.next_chunk(lane, _NEXT_CHUNK_S)
        while True:
            try:
                return self._flight.next_chunk(lane, standby.ALIVE_INTERVAL_S)
            except TimeoutError:
                channel.send(FrameKind.ALIVE)

    def _send_next(self, channel: FrameChannel, ahead: _Ahead) -> bool:
        """Whether there was a chunk to send. Its bytes are let go of with this call."""
        following = ahead.next_chunk()
        if following is None:
            return False
        self._send_chunk(channel, *following)
        return True

    def _send_chunk(
        self, channel: FrameChannel, index: int, is_again: bool, ready: tuple[int, bytes] | None = None
    ) -> None:
        if self._flight.is_named(index):
            channel.send(FrameKind.COPY, index, self._table.sha256(index))
            return
        length = self._table.length(index)
        body = (RAW_ENCODING, self._read_unchanged(index)) if is_again else ready
        if channel.is_filled_there:
            # To pack it, the node waits until it knows the whole chunk: not where the limit tells it bit by bit.
            is_told_at_once = self._carrier.bucket.piece_bytes(length) == length
            may_pack = channel.may_pack_there and is_told_at_once and not is_again
            # How fast that goes tells nothing of a link from here.
            self._send_bytes(channel, index, PACKED_ENCODING if may_pack else RAW_ENCODING, lambda _: None)
            return
        if body is None:
            body = self._file.body(self._table.offset(index), length)
        if self._is_given_up is not None:
            channel.send(FrameKind.DIGEST, index, self._table.sha256(index))
        with self._carrier.rates.moving():
            if body is not None:
                self._send_body(channel, index, *body)
            else:
                self._send_bytes(channel, index, RAW_ENCODING, self._carrier.rates.note_moved)

    def _send_bytes(self, channel: FrameChannel, index: int, encoding: int, note_moved: Callable[[int], None]) -> None:
        offset, left = self._table.offset(index), self._table.length(index)
        channel.send_data_header(index, left, encoding)
        while left:
            count = min(left, self._carrier.bucket.piece_bytes(PIECE_BYTES))
            self._carrier.bucket.take(count)
            # What was asked of the bucket and not sent is sent now: the limit counts it once.
            while count:
                sent = self._file.send(channel, offset, count)
                self._sent.add(sent, 0)
                note_moved(sent)
                offset, left, count = offset + sent, left - sent, count - sent

    def _send_body(self, channel: FrameChannel, index: int, encoding: int, body: bytes) -> None:
        channel.send_data_header(index, len(body), encoding)
        view = memoryview(body)
        while view:
            piece = view[: self._carrier.bucket.piece_bytes(PIECE_BYTES)]
            self._carrier.bucket.take(len(piece))
            channel.send_data(piece)
            self._sent.add(len(piece), 0)
            self._carrier.rates.note_moved(len(piece))
            view = view[len(piece) :]
        self._sent.add(0, self._table.length(index) - len(body))

    def _read_unchanged(self, index: int) -> bytes:
        """A refused chunk is either damaged on its way or no longer what the manifest says: look which."""
        data = self._file.read(self._table.offset(index), self._table.length(index))
        if hashlib.sha256(data).digest() != self._table.sha256(index):
            raise self._file.changed()
        return data


class _Ahead:
    """The chunks that a stream took and has not sent, because they are being packed. For the stream's thread alone.

    The link never waits for a worker: while none of them is ready, another chunk goes as it is.
    """

    def __init__(
        self,
        packer: Packer,
        flight: Flight,
        lane: Lane,
        table: ChunkTable,
        file: Source,
        await_chunk: Callable[[], tuple[int, bool] | None],
    ) -> None:
        self._packer = packer
        self._flight = flight
        self._lane = lane
        self._table = table
        self._file = file
        self._await_chunk = await_chunk
        self._chunks: list[tuple[int, bool, PackedChunk]] = []
        self._given: tuple[int, PackedChunk] | None = None

    def next_chunk(self) -> tuple[int, bool, tuple[int, bytes] | None] | None:
        """(chunk, whether it was refused before, what `PackedChunk` tells) to be sent now; None when the lane has no
        more to do. The one before is taken for sent. Raises what reading a chunk or `await_chunk` does."""
        if self._given is not None:
            self._packer.end(self._given[1])
            self._given = None
        while not self._chunks or (len(self._chunks) < _CHUNKS_AHEAD and self._packer.has_room):
            following = self._take()
            if following is None:
                break
            packed = self._begin(following[0])
            if packed is None:
                return *following, None
            self._chunks.append((*following, packed))
        if not self._chunks:
            return None
        ready = next((number for number, (_, _, packed) in enumerate(self._chunks) if packed.done()), None)
        if ready is None and (another := self._take()) is not None:
            return *another, None
        return self._give(ready or 0)

    def drop(self) -> None:
        """Give up what was not sent: the flight takes it back when the lane leaves, and another stream sends it."""
        unsent = [(index, packed) for index, _, packed in self._chunks]
        for index, packed in unsent + ([self._given] if self._given is not None else []):
            self._packer.leave(self._table.offset(index), self._table.length(index), packed)

    def _take(self) -> tuple[int, bool] | None:
        if self._chunks:
            unsent = sum(self._table.length(index) for index, _, _ in self._chunks)
            return self._flight.chunk_ahead(self._lane, unsent)
        return self._await_chunk()

    def _begin(self, index: int) -> PackedChunk | None:
        if self._flight.is_named(index):
            return None
        return self._packer.begin(self._table.offset(index), self._table.length(index), self._file.read)

    def _give(self, number: int) -> tuple[int, bool, tuple[int, bytes] | None]:
        """A chunk that is packed, or whose packing is not begun or is to be awaited."""
        index, is_again, packed = self._chunks.pop(number)
        self._given = index, packed
        return index, is_again, None if packed.cancel() else packed.result()


class _Answers:
    """A thread that takes in everything that a stream's agent says, until it ends."""

    def __init__(self, channel: FrameChannel, flight: Flight, lane: Lane, table: ChunkTable, sent: Sent) -> None:
        self.error: RemoteEvalError | None = None
        self._channel = channel
        self._flight = flight
        self._lane = lane
        self._table = table
        self._sent = sent
        self._answer: Outcome | LeftFacts | bytearray | None = None
        self._is_asked = False
        self._said = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="upload-answers", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def ask(
        self, kind: FrameKind, argument: int, body: bytes = b"", timeout_s: float = 10 * IDLE_TIMEOUT_S
    ) -> Outcome | LeftFacts | bytearray:
        """What the agent says to FINISH, KEEP or LEAVE: what became of the file, or a bitmap of what it has.

        The stream's idle timeout comes first where the agent is silent; `timeout_s` bounds even one that chatters.
        """
        self._is_asked = True
        self._channel.send(kind, argument, body)
        with self._said:
            is_there = self._said.wait_for(lambda: self._answer is not None or self.error is not None, timeout_s)
            answer, self._answer = self._answer, None
        if answer is not None:
            return answer
        if self.error is not None:
            raise self.error
        raise CommandTimeoutError(f"the node did not finish the file within {timeout_s:g} s (answered: {is_there})")

    def _run(self) -> None:
        try:
            while not self._take():
                pass
        except RemoteEvalError as error:
            with self._said:
                self.error = error
                self._said.notify_all()
            self._flight.fail(self._lane, error)

    def _take(self) -> bool:
        """Take in one frame; True for the last one."""
        expected = (*_NEWS, *_LAST_ANSWERS)
        header, body = self._channel.receive(*expected)
        if header.kind is FrameKind.ACK:
            self._flight.acknowledge(self._lane, header.argument)
        elif header.kind is FrameKind.REFUSED:
            self._flight.refuse(self._lane, header.argument)
        elif header.kind is FrameKind.COPIED:
            self._flight.copied(self._lane, header.argument)
        elif header.kind is FrameKind.ALIVE:
            self._flight.take_note(self._lane, header.argument)
        elif header.kind is FrameKind.PACKED:
            # It was counted as it is when it was asked for.
            self._sent.add(-header.argument, header.argument)
        else:
            last = _LAST_ANSWERS.get(header.kind)
            answer = self._channel.decode(last, body) if last else bitmap(body, len(self._table))
            if not self._is_asked:
                raise StreamDamagedError(f"the node says {header.kind.name} unasked")
            with self._said:
                self._answer, self._is_asked = answer, False
                self._said.notify_all()
            return not isinstance(answer, bytearray)
        return False
