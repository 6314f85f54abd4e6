"""The table of verbs: which module of the agent answers each."""

from __future__ import annotations

import importlib
import typing
from typing import Any

from remote_payload.agent.failure import AgentError
from remote_payload.wire.codec import from_json, to_json

VERBS = {
    "hello": "hello",
    "preflight": "preflight",
    "locate": "locate",
    "known_chunks": "known",
    "list_files": "listing",
    "chunk_manifest": "listing",
    "folder_manifest": "listing",
    "inspect": "inspect",
    "claim": "claim",
    "launch": "launch",
    "void": "claim",
    "status": "status",
    "cancel": "status",
    "manifest": "manifest",
    "unpack_code": "unpack",
    "assemble_folder": "assemble",
    "gc": "gc",
}
"""The function there has the verb's name, takes one request of `wire.messages`, and returns a dataclass of it or JSON.
A module is imported when its verb is asked for: every call is a process of its own, and imports are most of it."""


def perform(name: str, params: Any) -> Any:
    """Do verb `name` and return its JSON result. Raises `AgentError`, and `WireError` for params of another shape."""
    if name not in VERBS:
        raise AgentError("usage", f"this agent has no verb {name[:40]!r}", f"It has {', '.join(VERBS)}.")
    function = getattr(importlib.import_module(f"remote_payload.agent.{VERBS[name]}"), name)
    request_type = next(iter(typing.get_type_hints(function).values()))
    return to_json(function(from_json(request_type, params)))
