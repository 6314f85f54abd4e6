"""The seam between the pipeline and whatever starts processes on a cluster."""

from __future__ import annotations

import enum
from typing import Protocol

from orchestrator.errors import ConfigurationError
from remote_payload.wire.run_messages import StatusReply


class Presence(enum.Enum):
    """Whether anything of an attempt still exists on the cluster."""

    ALIVE = "alive"
    ABSENT = "absent"
    UNTELLABLE = "untellable"


class Scheduler(Protocol):
    """One way to start attempts. Implementations decide from what was read; they do no I/O themselves."""

    name: str
    launch_verb: str
    """The agent verb that starts a claimed attempt; takes an `AttemptRef`, answers `Launched`."""

    def presence(self, reply: StatusReply) -> Presence:
        """What one reading says of the attempt's processes. ABSENT needs a second reading before it is believed."""


def scheduler_for(name: str) -> Scheduler:
    """The scheduler that a profile names."""
    from orchestrator.schedulers.direct import Direct

    known: dict[str, Scheduler] = {"direct": Direct()}
    if name not in known:
        raise ConfigurationError(f"there is no scheduler named {name!r}", action=f"Use one of: {', '.join(known)}.")
    return known[name]
