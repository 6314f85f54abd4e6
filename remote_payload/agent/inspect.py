"""Header facts of a checkpoint, read without executing anything in it."""

from __future__ import annotations

import importlib
import os
from typing import Any

from remote_payload.agent.failure import AgentError
from remote_payload.agent.root import expand
from remote_payload.wire.codec import to_json
from remote_payload.wire.messages import InspectRequest


def inspect(request: InspectRequest) -> dict[str, Any]:
    """`header`, its `findings`, both as `text`, and `reads`: [offset, length] of what of a file the header took. Raises
    `AgentError` usage for what cannot be read."""
    # By name and late: the package beside it may import torch, which the agent must never wait for.
    checkpoint = importlib.import_module("remote_payload.checkpoint")
    render = importlib.import_module("remote_payload.checkpoint.render")
    path = request.path if os.path.exists(request.path) else expand(request.path, "checkpoint path")
    reads: list[tuple[int, int]] = []
    try:
        header = checkpoint.read_header(path, on_read=lambda offset, length: reads.append((offset, length)))
    except checkpoint.CheckpointError as error:
        raise AgentError("usage", str(error), error.action, error.kind) from error
    except OSError as error:
        raise AgentError("usage", f"{path} cannot be read: {error.strerror}") from error
    findings = checkpoint.header_findings(header)
    text = render.render_header(header, findings)
    return {"header": header.to_json(), "findings": to_json(findings), "text": text, "reads": to_json(reads)}
