"""Chunks of files here on their way to another node: as they are, or packed where the link to it is slower."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from typing import Optional

from remote_payload.agent.background import Background
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.failure import AgentError
from remote_payload.agent.send import PIECE_BYTES, open_wanted, read_exactly
from remote_payload.wire.forward import Fill
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.packing import pack_floats
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates
from remote_payload.wire.stream import PACKED_ENCODING, RAW_ENCODING, Buffer, FrameKind, encode_data_header


@dataclasses.dataclass(frozen=True)
class _Body:
    """Of the DATA frame of the chunk."""

    index: int
    encoding: int
    data: Buffer


class FarChunks:
    """Frames to the other node's agent. One chunk is packed, in a thread of its own, beside those that are sent: the
    link never waits for it while there is another one. For one thread, which calls `send_ready` before it waits for
    more as long as it `has_unsent`.

    Its methods raise `AgentError` for files, `PeerGoneError` where the other node is gone, `OSError`.
    """

    def __init__(self, channel: FdChannel, layout: NodeLayout) -> None:
        self._channel = channel
        self._files = _Files(layout)
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._rates = PackingRates()
        self._packing = Background()
        self._ready: Optional[_Body] = None
        self._saved: dict[int, int] = {}

    def send_frame(self, kind: FrameKind, argument: int, body: bytes) -> None:
        """Behind every chunk that came before it."""
        self._flush()
        self._channel.send_frame(kind, argument, body)

    def send_chunk(self, index: int, length: int, fills: Iterable[Fill], *, may_pack: bool) -> None:
        """Take the chunk of `length` bytes that `fills` name, in their order: it is sent, or packed and sent later."""
        if self._packing.is_busy or not (may_pack and length >= MIN_BYTES and self._rates.pays_beside(1)):
            self.send_ready()
            self._send_as_it_is(index, length, fills)
            return
        data = self._read(length, fills)
        ready, self._ready = self._ready, None
        self._rates.note_tried()
        self._packing.start(lambda: self._pack(index, data))
        self._send(ready)

    @property
    def has_unsent(self) -> bool:
        """Whether a chunk is packed, or being packed, and not sent."""
        return self._packing.is_busy or self._ready is not None

    def send_ready(self) -> None:
        """Send the chunk that is packed, if one is."""
        if not self._packing.is_busy:
            self._flush()

    def saved_in(self, index: int) -> int:
        """How many bytes packing took off the chunk, told once. For any thread, once the chunk has arrived."""
        return self._saved.pop(index, 0)

    def close(self) -> None:
        self._packing.wait()
        self._files.close()

    def _read(self, length: int, fills: Iterable[Fill]) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        for fill in fills:
            self._files.read(fill, 0, view[: fill.length])
            view = view[fill.length :]
        return data

    def _pack(self, index: int, data: bytearray) -> None:
        begun = time.monotonic()
        packed = pack_floats(data)
        if packed is None:
            self._ready = _Body(index, RAW_ENCODING, data)
            return
        self._rates.note_packed(len(data), time.monotonic() - begun)
        self._saved[index] = len(data) - len(packed)
        self._ready = _Body(index, PACKED_ENCODING, packed)

    def _flush(self) -> None:
        self._packing.wait()
        ready, self._ready = self._ready, None
        self._send(ready)

    def _send_as_it_is(self, index: int, length: int, fills: Iterable[Fill]) -> None:
        self._channel.send(encode_data_header(index, length))
        for fill in fills:
            for begin in range(0, fill.length, PIECE_BYTES):
                piece = self._buffer[: min(PIECE_BYTES, fill.length - begin)]
                self._files.read(fill, begin, piece)
                self._move(piece)

    def _send(self, body: Optional[_Body]) -> None:
        if body is None:
            return
        self._channel.send(encode_data_header(body.index, len(body.data), body.encoding))
        view = memoryview(body.data)
        for begin in range(0, len(view), PIECE_BYTES):
            self._move(view[begin : begin + PIECE_BYTES])

    def _move(self, piece: memoryview) -> None:
        """Only handing over is measured: a slow disk is no slow link."""
        with self._rates.moving():
            self._channel.send(piece)
            self._rates.note_moved(len(piece))


class _Files:
    """What is read here, one file open at a time."""

    def __init__(self, layout: NodeLayout) -> None:
        self._layout = layout
        self._path = ""
        self._fd: Optional[int] = None

    def read(self, fill: Fill, begin: int, view: memoryview) -> None:
        """Its bytes from the `begin`th on. Raises `AgentError`: the file is not there, or no longer the one that was
        described."""
        fd = self._open(fill.path)
        facts = os.fstat(fd)
        if (facts.st_size, facts.st_mtime_ns, facts.st_ino) != (fill.size, fill.mtime_ns, fill.inode):
            raise AgentError(
                "integrity", f"{fill.path} changed while it was copied", "Copy it again when it is complete."
            )
        if fill.offset < 0 or fill.offset + fill.length > fill.size:
            raise AgentError("usage", f"{fill.length} bytes at {fill.offset} are not in {fill.path}")
        read_exactly(fd, view, fill.offset + begin, fill.path)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, path: str) -> int:
        if self._fd is None or path != self._path:
            self.close()
            self._fd, self._path = open_wanted(self._layout, path), path
        return self._fd
