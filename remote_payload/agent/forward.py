"""The stream verb `forward`: chunks of files here go straight to another node's agent, told by the client which."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Optional, Union

from remote_payload.agent import root
from remote_payload.agent.channel import FarEndGoneError, FdChannel, PeerGoneError
from remote_payload.agent.failure import AgentError
from remote_payload.agent.far_node import FarNode
from remote_payload.agent.send import PIECE_BYTES, open_wanted, read_exactly
from remote_payload.wire.codec import WireError
from remote_payload.wire.forward import Fill, ForwardRequest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import (
    RAW_ENCODING,
    DamagedStreamError,
    FrameHeader,
    FrameKind,
    FrameReader,
    decode_json,
    encode_data_header,
    encode_frame,
)

_LOOK_S = 0.25
_FAR_IDLE_S = 120.0
"""The other agent says that it is alive far more often, and may take so long to journal what it has at the end."""
_LAST_WORDS = (FrameKind.FINISHED, FrameKind.KEPT, FrameKind.FAILURE)


def serve_forward(channel: FdChannel, request: ForwardRequest) -> None:
    """Carry frames between the client and the other node's agent until either is done or gone.

    When the client goes, the other agent sees the end of its input and journals what it has. Raises `AgentError`,
    `WireError`, `PeerGoneError` (`FarEndGoneError` where it was the other node), `OSError`.
    """
    layout = root.open_root(request.root)
    channel.idle_s = request.idle_s
    with contextlib.ExitStack() as at_end, FarNode(request) as far:
        far.start(request.script, _FAR_IDLE_S)
        channel.send_frame(FrameKind.FORWARDING)
        forward = _Forward(channel, far, layout)
        at_end.callback(forward.await_end)  # once ssh has ended, nobody is held up by it
        forward.run()


class _Forward:
    """Answers go to the client in the calling thread, frames from the client to the other node in one of their own."""

    def __init__(self, channel: FdChannel, far: FarNode, layout: NodeLayout) -> None:
        self._channel = channel
        self._far = far
        self._files = _Files(layout)
        self._failure: Union[AgentError, WireError, OSError, None] = None
        self._client_left = False
        self._is_over = threading.Event()
        self._feeder = threading.Thread(target=self._feed, name="forward", daemon=True)

    def await_end(self) -> None:
        """Nothing is read from the client any more afterwards."""
        self._is_over.set()
        self._feeder.join()

    def run(self) -> None:
        self._feeder.start()
        reader = FrameReader(self._far.channel.fill)
        last: Optional[FrameKind] = None
        while (answer := _next_answer(reader)) is not None:
            header, body = answer
            last = header.kind
            self._channel.send_frame(header.kind, header.argument, body)
        if self._failure is not None:
            raise self._failure
        if last in _LAST_WORDS:
            return
        if self._client_left:
            raise PeerGoneError("the client closed the stream")
        raise FarEndGoneError(self._far.last_words() or "the connection to the other node ended")

    def _feed(self) -> None:
        reader = FrameReader(self._fill)
        try:
            while True:
                self._feed_frame(reader)
        except PeerGoneError:
            pass  # of either side: who it was is told by the flag, and by what the far end says
        except (AgentError, WireError, OSError) as error:
            self._failure = error
        finally:
            self._files.close()
            self._far.close_write()

    def _fill(self, view: memoryview) -> None:
        heard_at = time.monotonic()
        try:
            while view:
                if self._channel.wait_readable(_LOOK_S):
                    view = view[self._channel.read_some(view) :]
                    heard_at = time.monotonic()
                elif self._is_over.is_set() or time.monotonic() - heard_at > self._channel.idle_s:
                    raise PeerGoneError("nothing more is awaited")
        except PeerGoneError:
            self._client_left = True
            raise

    def _feed_frame(self, reader: FrameReader) -> None:
        header = reader.header()
        if header.kind is not FrameKind.DATA:
            self._far.channel.send(encode_frame(header.kind, header.argument, reader.body(header)))
            return
        if header.encoding != RAW_ENCODING:
            raise DamagedStreamError("a chunk that is read here cannot come packed")
        self._far.channel.send(encode_data_header(header.argument, header.length))
        left = header.length
        while left:
            following = reader.header()
            if following.kind is not FrameKind.FILL:
                raise DamagedStreamError(f"a {following.kind.name} frame arrived amid a chunk")
            fill = decode_json(Fill, reader.body(following))
            if not 0 < fill.length <= left:
                raise DamagedStreamError(f"{fill.length} bytes are to fill a chunk that lacks {left}")
            self._files.send(self._far.channel, fill)
            left -= fill.length


class _Files:
    """What is read here, one file open at a time."""

    def __init__(self, layout: NodeLayout) -> None:
        self._layout = layout
        self._path = ""
        self._fd: Optional[int] = None
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def send(self, channel: FdChannel, fill: Fill) -> None:
        """Raises `AgentError`: the file is not there, or no longer the one that was described."""
        fd = self._open(fill.path)
        facts = os.fstat(fd)
        if (facts.st_size, facts.st_mtime_ns, facts.st_ino) != (fill.size, fill.mtime_ns, fill.inode):
            raise AgentError(
                "integrity", f"{fill.path} changed while it was copied", "Copy it again when it is complete."
            )
        if fill.offset < 0 or fill.offset + fill.length > fill.size:
            raise AgentError("usage", f"{fill.length} bytes at {fill.offset} are not in {fill.path}")
        for offset in range(fill.offset, fill.offset + fill.length, PIECE_BYTES):
            piece = self._buffer[: min(PIECE_BYTES, fill.offset + fill.length - offset)]
            read_exactly(fd, piece, offset, fill.path)
            channel.send(piece)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, path: str) -> int:
        if self._fd is None or path != self._path:
            self.close()
            self._fd, self._path = open_wanted(self._layout, path), path
        return self._fd


def _next_answer(reader: FrameReader) -> Optional[tuple[FrameHeader, bytes]]:
    """The next frame of the far agent; None at the end of what it says."""
    try:
        header = reader.header()
        if header.kind is FrameKind.DATA:
            raise DamagedStreamError("the other node sends data")
        return header, reader.body(header)
    except PeerGoneError:
        return None
