"""The stream verb `forward`: a node logs in to another by its own means and fills that one's store from its own disk.

It stands between the client and the other node's `receive` (`wire/stream.py`). The request's params are a
`ForwardRequest`. First

    agent → client   FORWARDING   the other node's agent is ready; FAILURE instead where the login or that agent is not

and then frames go to that agent and back as they are, but for the bytes of chunks, which come from the disk:

    client → agent   DATA      the header alone, with the length of the chunk as it is. Encoding 1: it may go packed,
                               where that pays
                     FILL      JSON `Fill`: the chunk's next bytes; as many as its length takes, in order
    agent → client   PACKED    before ACK or REFUSED of a chunk; argument: how many bytes packing took off it

The agent ends with `FAR_END_GONE_STATUS` where the way to the other one was lost in the middle.
"""

from __future__ import annotations

import dataclasses

from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_ssh_host, check_ssh_user

FAR_END_GONE_STATUS = 76
OTHER_MACHINE = "other-machine"
"""What an agent says in place of its ready line where the request is for another machine than it runs on."""


@dataclasses.dataclass(frozen=True)
class SshLogin:
    """Whom `ssh` is asked to reach. All else is the account's own configuration on the node that asks."""

    host: str
    user: str
    port: int
    connect_timeout_s: float


@dataclasses.dataclass(frozen=True)
class ForwardRequest:
    """`command` is run on the other node and given `script` on its standard input, which starts an agent that says its
    ready line with `nonce`. `idle_s`: the agent gives up after so long without a frame."""

    root: str
    login: SshLogin
    command: str
    script: str
    nonce: str
    idle_s: float


@dataclasses.dataclass(frozen=True)
class Fill:
    """`length` bytes from `offset` of the file at the absolute `path`, which must still have these facts."""

    path: str
    offset: int
    length: int
    size: int
    mtime_ns: int
    inode: int


def check_login(login: SshLogin) -> SshLogin:
    """Return `login` if no part of it can be taken for an option or another address, else raise `WireError`."""
    check_ssh_host(login.host)
    check_ssh_user(login.user)
    if isinstance(login.port, bool) or not 0 < login.port < 65536 or not 0 < login.connect_timeout_s < 3600:
        raise WireError(f"port {login.port} or timeout {login.connect_timeout_s} is out of range")
    return login
