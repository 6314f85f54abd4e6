"""The stream verb `forward`: chunks of files here go straight to another node's agent, told by the client which."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Optional, Union

from remote_payload.agent import root
from remote_payload.agent.channel import FarEndGoneError, FdChannel, PeerGoneError
from remote_payload.agent.failure import AgentError
from remote_payload.agent.far_chunks import FarChunks
from remote_payload.agent.far_node import FarNode
from remote_payload.wire.codec import WireError
from remote_payload.wire.forward import Fill, ForwardRequest
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import (
    PACKED_ENCODING,
    DamagedStreamError,
    FrameHeader,
    FrameKind,
    FrameReader,
    decode_json,
)

_LOOK_S = 0.25
_PROMPT_S = 0.001
_FAR_IDLE_S = 900.0
"""On stand-by the other agent says nothing, however long; at work it says every few seconds that it is alive, and the
client listens for that."""
_OF_A_CHUNK = (FrameKind.ACK, FrameKind.REFUSED)
_LAST_WORDS = (FrameKind.FINISHED, FrameKind.KEPT, FrameKind.LEFT, FrameKind.FAILURE)


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
        self._chunks = FarChunks(far.channel, layout)
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
            if last in _OF_A_CHUNK and (saved := self._chunks.saved_in(header.argument)):
                self._channel.send_frame(FrameKind.PACKED, saved)
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
            self._chunks.close()
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
        while self._chunks.has_unsent and not self._channel.wait_readable(_PROMPT_S):
            self._chunks.send_ready()
        header = reader.header()
        if header.kind is not FrameKind.DATA:
            self._chunks.send_frame(header.kind, header.argument, reader.body(header))
            return
        fills = _fills(reader, header.length)
        may_pack = header.encoding == PACKED_ENCODING
        self._chunks.send_chunk(header.argument, header.length, fills, may_pack=may_pack)


def _fills(reader: FrameReader, length: int) -> Iterator[Fill]:
    """Those of a chunk of so many bytes."""
    while length:
        following = reader.header()
        if following.kind is not FrameKind.FILL:
            raise DamagedStreamError(f"a {following.kind.name} frame arrived amid a chunk")
        fill = decode_json(Fill, reader.body(following))
        if not 0 < fill.length <= length:
            raise DamagedStreamError(f"{fill.length} bytes are to fill a chunk that lacks {length}")
        yield fill
        length -= fill.length


def _next_answer(reader: FrameReader) -> Optional[tuple[FrameHeader, bytes]]:
    """The next frame of the far agent; None at the end of what it says."""
    try:
        header = reader.header()
        if header.kind is FrameKind.DATA:
            raise DamagedStreamError("the other node sends data")
        return header, reader.body(header)
    except PeerGoneError:
        return None
