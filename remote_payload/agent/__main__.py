"""The agent's command line: `call`, `stream` and `supervise`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from remote_payload.agent.failure import AgentError
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.codec import WireError, to_json
from remote_payload.wire.failures import RemoteFailure
from remote_payload.wire.names import check_nonce

_USAGE = "usage: payload agent call <base64 | -> | stream <base64 | -> | supervise <attempt folder> <nonce>"
_MAX_REQUEST_BYTES = 64 * 1024 * 1024
_NODE_IS_UNFIT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


def main(arguments: Sequence[str]) -> int:
    """0 when a reply could be given, failures included; 2 for a command line without even a nonce to reply to."""
    os.umask(0o077)
    command, *rest = arguments or [""]
    try:
        if command == "call" and len(rest) == 1:
            return _call(rest[0])
        if command == "stream" and len(rest) == 1:
            return _stream(rest[0])
        if command == "supervise" and len(rest) == 2:
            from remote_payload.agent.supervise import supervise

            return supervise(rest[0], rest[1])
    except (WireError, AgentError) as error:
        print(f"agent: {error}", file=sys.stderr)
        return 2
    print(_USAGE, file=sys.stderr)
    return 2


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply `{"ok": …}` or `{"error": …}` to a decoded request. Never raises.

    Where the request holds the params of a `hello`, that comes first; the verb's root is the one that it tells.
    """
    try:
        check_protocol(request)
        from remote_payload.agent.verbs import perform

        verb, params = str(request.get("verb")), request.get("params", {})
        if "hello" not in request:
            return {"ok": perform(verb, params)}
        greeting = perform("hello", request["hello"])
        return {"hello": greeting, "ok": perform(verb, {**params, "root": greeting["root"]})}
    except AgentError as error:
        failure = error.failure
    except WireError as error:
        failure = RemoteFailure("usage", f"the request has another form than this agent expects: {error}")
    except OSError as error:
        kind = "unfit" if error.errno in _NODE_IS_UNFIT else "internal"
        failure = RemoteFailure(kind, f"on the node: {error}", detail=_trace())
    except Exception as error:  # noqa: BLE001 - the outermost boundary: the client is told of our own mistakes too
        failure = RemoteFailure("internal", f"{type(error).__name__}: {error}", detail=_trace())
    return {"error": to_json(failure)}


def _trace() -> str:
    import traceback

    return traceback.format_exc()


def check_protocol(request: dict[str, Any]) -> None:
    """Raise `AgentError` unless client and agent speak the same version."""
    theirs = request.get("protocol")
    if theirs != PROTOCOL_VERSION:
        raise AgentError(
            "usage",
            f"the client speaks protocol {theirs!r}, this agent {PROTOCOL_VERSION}",
            "Use the payload that comes with the client.",
        )


def decode(text: str) -> tuple[dict[str, Any], str]:
    """(request, nonce) from base64 text, or from standard input where it is `-`. Raises `WireError`."""
    if text == "-":
        text = sys.stdin.read(_MAX_REQUEST_BYTES).strip()
    try:
        request = frames.decode_request(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the request is not base64 JSON: {error}") from None
    if not isinstance(request, dict):
        raise WireError("the request is no object")
    return request, check_nonce(request.get("nonce", ""))


def _call(text: str) -> int:
    request, nonce = decode(text)
    # The reply has its stream to itself: whatever a verb or a module prints goes to standard error.
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    reply = frames.encode_reply(nonce, PROTOCOL_VERSION, answer(request))
    with open(out, "wb") as stream:
        stream.write(reply)
    return 0


def _stream(text: str) -> int:
    from remote_payload.agent.streams import main_stream

    request, nonce = decode(text)
    return int(main_stream(request, nonce) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
