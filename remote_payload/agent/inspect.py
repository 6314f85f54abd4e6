"""Header facts of a checkpoint, read without executing anything in it."""

from __future__ import annotations

import importlib
from typing import Any

from remote_payload.agent.failure import AgentError
from remote_payload.agent.root import expand
from remote_payload.wire.messages import InspectRequest


def inspect(request: InspectRequest) -> dict[str, Any]:
    """The header as JSON. Raises `AgentError` usage for what is missing, damaged or no checkpoint."""
    # By name and late: the package beside it may import torch, which the agent must never wait for.
    checkpoint = importlib.import_module("remote_payload.checkpoint")
    path = expand(request.path, "checkpoint path")
    try:
        header: dict[str, Any] = checkpoint.read_header(path).to_json()
    except checkpoint.CheckpointError as error:
        raise AgentError("usage", str(error), error.action, error.kind) from error
    except OSError as error:
        raise AgentError("usage", f"{path} cannot be read: {error.strerror}") from error
    return header
