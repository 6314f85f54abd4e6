"""The table of verbs: what each takes and which function answers it."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

from remote_payload.agent import (
    assemble,
    claim,
    gc,
    hello,
    inspect,
    launch,
    listing,
    locate,
    manifest,
    preflight,
    status,
    unpack,
)
from remote_payload.agent.failure import AgentError
from remote_payload.wire import messages
from remote_payload.wire.codec import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Verb:
    """`function` takes a `request_type` and returns a dataclass of `wire.messages`, or JSON."""

    request_type: type
    function: Callable[[Any], Any]


VERBS = {
    "hello": Verb(messages.HelloRequest, hello.hello),
    "preflight": Verb(messages.PreflightRequest, preflight.preflight),
    "locate": Verb(messages.LocateRequest, locate.locate),
    "list_files": Verb(messages.ListRequest, listing.list_files),
    "chunk_manifest": Verb(messages.ListRequest, listing.chunk_manifest),
    "folder_manifest": Verb(messages.ListRequest, listing.folder_manifest),
    "inspect": Verb(messages.InspectRequest, inspect.inspect),
    "claim": Verb(messages.ClaimRequest, claim.claim),
    "launch": Verb(messages.AttemptRef, launch.launch),
    "void": Verb(messages.AttemptRef, claim.void),
    "status": Verb(messages.StatusRequest, status.status),
    "cancel": Verb(messages.AttemptRef, status.cancel),
    "manifest": Verb(messages.AttemptRef, manifest.manifest),
    "unpack_code": Verb(messages.UnpackRequest, unpack.unpack_code),
    "assemble_folder": Verb(messages.AssembleRequest, assemble.assemble_folder),
    "gc": Verb(messages.GcRequest, gc.gc),
}


def perform(name: str, params: Any) -> Any:
    """Do verb `name` and return its JSON result. Raises `AgentError`, and `WireError` for params of another shape."""
    verb = VERBS.get(name)
    if verb is None:
        raise AgentError("usage", f"this agent has no verb {name[:40]!r}", f"It has {', '.join(VERBS)}.")
    return to_json(verb.function(from_json(verb.request_type, params)))
