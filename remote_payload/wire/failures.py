"""How the agent says that it could not; apart from `messages`, which the stream verbs need nothing of."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RemoteFailure:
    """Why the agent could not do it. `kind` maps to the client's exception tree:
    usage, unfit, no_space, integrity, conflict, not_found, internal."""

    kind: str
    message: str
    action: str = ""
    detail: str = ""
