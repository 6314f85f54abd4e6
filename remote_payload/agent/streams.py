"""`agent stream`: the verbs that speak the binary protocol of `wire/stream.py` on standard input and output."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType
from typing import Any, Callable, Optional

from remote_payload.agent.channel import FarEndGoneError, FdChannel, PeerGoneError, widen
from remote_payload.agent.failure import AgentError
from remote_payload.agent.receive import serve_receive
from remote_payload.agent.send import serve_send
from remote_payload.wire import PROTOCOL_VERSION
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.failures import RemoteFailure
from remote_payload.wire.forward import FAR_END_GONE_STATUS, OTHER_MACHINE, ForwardRequest
from remote_payload.wire.names import check_nonce, printable
from remote_payload.wire.stream import (
    DamagedStreamError,
    FrameKind,
    FrameReader,
    ReceiveRequest,
    SendRequest,
    StandbyRequest,
    StreamCall,
    StreamFailure,
    decode_json,
)

PEER_GONE_STATUS = 75
"""Exit status when the client left in the middle: whatever was done stays done, and another stream goes on."""


def main_stream(request: dict[str, Any], nonce: str) -> int:
    """Say that we are ready, serve the verb of `request` until the client is done, and return the exit status.

    Failures travel as FAILURE frames with exit status 0; only our own mistakes end in a traceback.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    output = os.dup(1)
    os.dup2(2, 1)  # a stray print must not get between frames
    for fd in (0, output):
        widen(fd)
    with FdChannel(0, output) as channel:
        return serve_stream(channel, request, nonce)


def serve_stream(channel: FdChannel, request: dict[str, Any], nonce: str) -> int:
    """As `main_stream`, over any channel."""
    try:
        if _is_for_another(request):
            channel.send(_said(nonce, OTHER_MACHINE))
            return 0
        channel.send(_said(nonce, "ready"))
        failure = _perform(channel, request)
        if failure is not None:
            channel.send_json(FrameKind.FAILURE, failure)
    except FarEndGoneError as error:
        print(printable(str(error)), file=sys.stderr)
        return FAR_END_GONE_STATUS
    except PeerGoneError:
        return PEER_GONE_STATUS
    return 0


def _is_for_another(request: dict[str, Any]) -> bool:
    """Whether the request names the machine that it is for, and that is not this one: where another node logs in, a
    name may lead elsewhere than it does from the client."""
    if request.get("machine_id") is None:
        return False
    from remote_payload.agent.machine import machine_id

    return bool(request["machine_id"] != machine_id())


def _said(nonce: str, outcome: str) -> bytes:
    return f"\n=remote-eval={check_nonce(nonce)}={outcome}=\n".encode()


def _perform(channel: FdChannel, request: dict[str, Any]) -> Optional[StreamFailure]:
    """Serve one verb after another until the client goes, which is a `PeerGoneError`, or one fails."""
    try:
        if request.get("verb") == "standby":
            channel.idle_s = from_json(StandbyRequest, request.get("params")).wait_s
            request = {**request, **to_json(_stand_by(channel))}
        while True:
            _verb(request)(channel, request.get("params"))
            if request.get("verb") == "forward":
                break
            request = {**request, **to_json(_stand_by(channel))}
    except AgentError as error:
        return StreamFailure(error.failure)
    except DamagedStreamError as error:
        return StreamFailure(RemoteFailure("integrity", f"the stream is damaged: {error}"), resumable=True)
    except WireError as error:
        return StreamFailure(RemoteFailure("usage", str(error)))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
        return StreamFailure(RemoteFailure("unfit", f"{what}{reason}"))
    return None


def _stand_by(channel: FdChannel) -> StreamCall:
    """What the client wants, once it says so; until then it says that it is there."""
    reader = FrameReader(channel.fill)
    while True:
        header = reader.header()
        if header.kind not in (FrameKind.ALIVE, FrameKind.PERFORM):
            raise DamagedStreamError(f"a {header.kind.name} frame arrived on a stand-by stream")
        body = reader.body(header)
        if header.kind is FrameKind.PERFORM:
            return decode_json(StreamCall, body)


def _verb(request: dict[str, Any]) -> Callable[[FdChannel, Any], None]:
    """What serves the verb."""
    if request.get("protocol") != PROTOCOL_VERSION:
        raise AgentError(
            "usage",
            f"the client speaks protocol {request.get('protocol')!r}, this agent {PROTOCOL_VERSION}",
            "Use the same version of remote-eval on both sides.",
        )
    verb = request.get("verb")
    if verb == "receive":
        return lambda channel, params: serve_receive(channel, from_json(ReceiveRequest, params))
    if verb == "send":
        return lambda channel, params: serve_send(channel, from_json(SendRequest, params))
    if verb == "forward":
        from remote_payload.agent.forward import serve_forward  # every other stream starts without it

        return lambda channel, params: serve_forward(channel, from_json(ForwardRequest, params))
    raise AgentError("usage", f"there is no stream verb {verb!r}")


def _leave(number: int, _frame: Optional[FrameType]) -> None:
    """Asked to end: leave by the same door as when the client goes, past the journal."""
    raise PeerGoneError(f"signal {number}")
