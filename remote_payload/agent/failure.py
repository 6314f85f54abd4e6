"""How a verb says that it could not do what it was asked."""

from __future__ import annotations

from remote_payload.wire.failures import RemoteFailure


class AgentError(Exception):
    """A failure that the client is to hear of as it stands. `kind` is one of `RemoteFailure`'s."""

    def __init__(self, kind: str, message: str, action: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.failure = RemoteFailure(kind, message, action, detail)
