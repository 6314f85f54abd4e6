"""No scheduler: the agent starts the supervisor as a detached process on the node itself."""

from __future__ import annotations

from orchestrator.schedulers.base import Presence
from remote_payload.wire.run_messages import StatusReply


class Direct:
    """Processes of the node are the truth; another machine behind the same name can tell nothing of them."""

    name = "direct"
    launch_verb = "launch"

    def presence(self, reply: StatusReply) -> Presence:
        if reply.claim_machine_id is not None and reply.claim_machine_id != reply.machine_id:
            return Presence.UNTELLABLE
        if reply.supervisor_alive or reply.processes_with_nonce:
            return Presence.ALIVE
        if reply.supervisor_alive is None and reply.status is not None:
            return Presence.UNTELLABLE
        return Presence.ABSENT
