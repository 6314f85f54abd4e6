"""Files of a node as a `Source`: read through streams of their own, spans at a time, and verified."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Sequence

from orchestrator.errors import IntegrityError
from orchestrator.transfer.channel import FrameChannel, StreamDamagedError
from orchestrator.transfer.node_lines import NodeLines
from orchestrator.transfer.source import LocalFileChangedError
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.forward import Fill
from remote_payload.wire.members import joined
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.names import printable
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates
from remote_payload.wire.stream import (
    MAX_DATA_BYTES,
    PACKED_ENCODING,
    RAW_ENCODING,
    FrameKind,
    SpanEnd,
    SpanFacts,
    Want,
)

_SAVED_BY_PACKING = 0.3
"""Of floats, about. A stream packs, fetches and sends a chunk in turn: packing must save more time than it takes."""
_SMALL_BYTES = 256 * 1024
_AHEAD_CHUNKS = 64
_AHEAD_BYTES = 4 * 1024 * 1024
"""Small chunks of many files are asked for together, up to so many: each asking is a round trip."""


@dataclasses.dataclass(frozen=True)
class DescribedFile:
    """A file on a node, absolute `path`, as it was `listed` and then read, if its manifest is not remembered."""

    path: str
    listed: ListedFile
    manifest: ChunkManifest
    was_remembered: bool = True


class NodeFiles:
    """Files of a node, one behind the other, for any thread.

    `rates` are of the way from node to node as a whole; `packing`: where they say so, the node packs floats.
    """

    def __init__(
        self,
        lines: NodeLines,
        files: Sequence[DescribedFile],
        rates: PackingRates,
        *,
        packing: bool,
    ) -> None:
        self._lines = lines
        self._files = [file for file in files if file.listed.size]
        self._starts = [0, *itertools.accumulate(file.listed.size for file in self._files)]
        self._chunks = joined(file.manifest for file in self._files).chunks
        self._chunk_starts = [chunk.offset for chunk in self._chunks]
        self._asking_ahead = threading.Lock()
        self._ahead: dict[int, bytes] = {}
        self._rates = rates
        self._packing = packing

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        if channel.is_filled_there:
            file, within = self._at(offset)
            listed = file.listed
            fill = Fill(file.path, within, count, listed.size, listed.mtime_ns, listed.inode)
            channel.send_json(FrameKind.FILL, fill)
            return count
        data = self.read(offset, min(count, MAX_DATA_BYTES))
        channel.send_data(data)
        return len(data)

    def read(self, offset: int, count: int) -> bytes:
        """Raises `IntegrityError` where the file has changed, and the `UnreachableError` family."""
        file, within = self._at(offset)
        return self._lines.ask(lambda channel: self._ask(channel, file, Want(file.path, within, count)))[1]

    def body(self, offset: int, count: int, /) -> tuple[int, bytes]:
        """Whole chunks are asked for at once, each asking being a round trip; raises as `read`. A packed one goes on as
        it came: the target's digest is over what is in it."""
        if count < _SMALL_BYTES and len(self._files) > 1:
            return RAW_ENCODING, self._read_small(offset)
        packers = _SAVED_BY_PACKING * max(1, self._lines.count)
        may_pack = self._packing and count >= MIN_BYTES and self._rates.pays(packers)
        if may_pack:
            self._rates.note_tried()
        file, within = self._at(offset)
        want = Want(file.path, within, count, may_pack=may_pack)
        return self._lines.ask(lambda channel: self._ask(channel, file, want))

    def _read_small(self, offset: int) -> bytes:
        """A small chunk, from those that were asked for ahead or with those that follow it."""
        with self._asking_ahead:
            if offset not in self._ahead:
                self._ahead = self._lines.ask(lambda channel: self._ask_ahead(channel, offset))
            return self._ahead.pop(offset)

    def _ask_ahead(self, channel: FrameChannel, offset: int) -> dict[int, bytes]:
        first = bisect.bisect_left(self._chunk_starts, offset)
        wanted, total = [], 0
        for chunk in self._chunks[first : first + _AHEAD_CHUNKS]:
            total += chunk.length
            if chunk.length >= _SMALL_BYTES or total > _AHEAD_BYTES:
                break
            file, within = self._at(chunk.offset)
            wanted.append((chunk.offset, file, Want(file.path, within, chunk.length)))
        for _, _, want in wanted:
            channel.send_json(FrameKind.WANT, want)
        return {start: self._take_in(channel, file, want)[1] for start, file, want in wanted}

    def _at(self, offset: int) -> tuple[DescribedFile, int]:
        index = bisect.bisect_right(self._starts, offset) - 1
        return self._files[index], offset - self._starts[index]

    def changed(self) -> LocalFileChangedError:
        return changed_on_node(self._files[0].path if len(self._files) == 1 else "a file of the folder")

    def close(self) -> None:
        return

    def _ask(self, channel: FrameChannel, file: DescribedFile, want: Want) -> tuple[int, bytes]:
        channel.send_json(FrameKind.WANT, want)
        return self._take_in(channel, file, want)

    def _take_in(self, channel: FrameChannel, file: DescribedFile, want: Want) -> tuple[int, bytes]:
        """(encoding, body) of a span, checked unless it is packed."""
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed = file.listed
        if (facts.size, facts.mtime_ns, facts.inode) != (listed.size, listed.mtime_ns, listed.inode):
            raise changed_on_node(file.path)
        if (facts.offset, facts.length) != (want.offset, want.length):
            raise IntegrityError("the node sends another span than was asked for")
        data = memoryview(bytearray(want.length))
        taken, encoding = 0, RAW_ENCODING
        while taken < want.length and encoding == RAW_ENCODING:
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != want.offset + taken or not 0 < header.length <= want.length - taken:
                raise StreamDamagedError("data that was not asked for arrived")
            encoding = header.encoding
            if encoding == PACKED_ENCODING and not (want.may_pack and taken == 0 and header.length < want.length):
                raise StreamDamagedError("a packed span that was not asked for arrived")
            with self._rates.moving():
                channel.read_data(data[taken : taken + header.length])
            taken += header.length
        end = channel.decode(SpanEnd, channel.receive(FrameKind.END)[1])
        if encoding == PACKED_ENCODING:
            self._rates.note_packed(want.length, end.packing_s)
        elif end.sha256 != hashlib.sha256(data).hexdigest():
            raise StreamDamagedError("a span arrived damaged")
        return encoding, bytes(data[:taken])


def changed_on_node(path: str) -> LocalFileChangedError:
    return LocalFileChangedError(
        f"{printable(path)} changed while it was copied", action="Copy it again when it is complete."
    )
