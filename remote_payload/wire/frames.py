"""Framing of requests and replies, so that banners and shell start-up files on either stream cannot touch them.

A reply is `\\n=remote-eval=<nonce>=<protocol>=<length>=\\n`, then `length` bytes of base64 JSON, then
`\\n=end=<nonce>=\\n`. Whatever stands before or behind it is noise and is handed back as such, for diagnosis.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_nonce

_HEAD = rb"\n=remote-eval=%s=(\d{1,6})=(\d{1,12})=\n"


def encode_request(value: Any) -> str:
    """A JSON value as base64 text: plain ASCII without quotes, safe inside any shell script."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def decode_request(text: str) -> Any:
    return json.loads(base64.b64decode(text, validate=True))


def encode_reply(nonce: str, protocol: int, value: Any) -> bytes:
    body = base64.b64encode(json.dumps(value).encode())
    return b"\n=remote-eval=%s=%d=%d=\n%s\n=end=%s=\n" % (
        nonce.encode(),
        protocol,
        len(body),
        body,
        nonce.encode(),
    )


def decode_reply(nonce: str, stdout: bytes) -> tuple[int, Any, bytes]:
    """(protocol, value, noise around the frame). `WireError` when the frame is absent, cut short or not JSON."""
    wanted = check_nonce(nonce).encode()
    head = re.search(_HEAD % wanted, b"\n" + stdout)
    if head is None:
        raise WireError("the reply holds no frame of ours")
    body_start = head.end() - 1
    body_end = body_start + int(head.group(2))
    tail = b"\n=end=%s=\n" % wanted
    if stdout[body_end : body_end + len(tail)] != tail:
        raise WireError("the reply was cut short")
    try:
        value = json.loads(base64.b64decode(stdout[body_start:body_end], validate=True))
    except (binascii.Error, ValueError) as error:
        raise WireError(f"the reply's frame is damaged: {error}") from None
    noise = stdout[: max(head.start() - 1, 0)] + stdout[body_end + len(tail) :]
    return int(head.group(1)), value, noise
