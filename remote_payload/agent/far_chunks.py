"""Chunks of files here on their way to another node: as they are, or packed where the link to it is slower."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from typing import Optional

from remote_payload.agent.background import Background
from remote_payload.agent.channel import FdChannel, PeerGoneError
from remote_payload.agent.failure import AgentError
from remote_payload.agent.send import PIECE_BYTES, open_wanted, read_exactly
from remote_payload.wire.forward import Fill
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.packing import pack_floats
from remote_payload.wire.packing_rates import MIN_BYTES, PackingRates
from remote_payload.wire.stream import PACKED_ENCODING, RAW_ENCODING, Buffer, FrameKind, encode_data_header


class FarChunks:
    """Frames to the other node's agent, in their order. The thread that calls reads and packs a chunk while the one
    before is being sent: no other one packs.

    Its methods raise `AgentError` for files, `PeerGoneError` where the other node is gone, `OSError`.
    """

    def __init__(self, channel: FdChannel, layout: NodeLayout) -> None:
        self._channel = channel
        self._files = _Files(layout)
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._rates = PackingRates()
        self._sending = Background()
        self._saved: dict[int, int] = {}

    def send_frame(self, kind: FrameKind, argument: int, body: bytes) -> None:
        self._sending.wait()
        self._channel.send_frame(kind, argument, body)

    def send_chunk(self, index: int, length: int, fills: Iterable[Fill], *, may_pack: bool) -> None:
        """Send the chunk of `length` bytes that `fills` name, in their order."""
        if may_pack and length >= MIN_BYTES and self._rates.pays(1):
            self._rates.note_tried()
            self._send_whole(index, length, list(fills))
            return
        self._sending.wait()
        self._channel.send(encode_data_header(index, length))
        for fill in fills:
            for begin in range(0, fill.length, PIECE_BYTES):
                piece = self._buffer[: min(PIECE_BYTES, fill.length - begin)]
                self._files.read(fill, begin, piece)
                self._move(piece)

    def saved_in(self, index: int) -> int:
        """How many bytes packing took off the chunk, told once. For any thread, once the chunk has arrived."""
        return self._saved.pop(index, 0)

    def close(self) -> None:
        """What is being sent goes to its end, or as far as the other node takes it."""
        with contextlib.suppress(PeerGoneError, OSError):
            self._sending.wait()
        self._files.close()

    def _send_whole(self, index: int, length: int, fills: list[Fill]) -> None:
        """Packed, where that makes it smaller."""
        begun = time.monotonic()
        data = bytearray(length)
        view = memoryview(data)
        for fill in fills:
            self._files.read(fill, 0, view[: fill.length])
            view = view[fill.length :]
        packed = pack_floats(data)
        if packed is None:
            self._sending.start(lambda: self._send_body(index, RAW_ENCODING, data))
            return
        self._rates.note_packed(length, time.monotonic() - begun)
        self._saved[index] = length - len(packed)
        self._sending.start(lambda: self._send_body(index, PACKED_ENCODING, packed))

    def _send_body(self, index: int, encoding: int, body: Buffer) -> None:
        self._channel.send(encode_data_header(index, len(body), encoding))
        view = memoryview(body)
        for begin in range(0, len(body), PIECE_BYTES):
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
