"""The first verb: who is there, and is the node root usable."""

from __future__ import annotations

import getpass
import os
import platform
import sys
import time

from remote_payload.agent import bytecode, machine, own_code, quota, root
from remote_payload.wire import PROTOCOL_VERSION
from remote_payload.wire.messages import Hello, HelloRequest


def hello(request: HelloRequest) -> Hello:
    """Facts of this node; creates the root where asked. Raises `AgentError` for a root that is not ours to use."""
    wanted = root.expand(request.root, "node root")
    layout = root.make_root(wanted) if request.create else root.open_root(wanted)
    bytecode.compile_archive(own_code.archive(), layout.payloads)
    return Hello(
        protocol=PROTOCOL_VERSION,
        payload_sha256=own_code.archive_sha256(),
        machine_id=machine.machine_id(),
        boot_id=machine.boot_id(),
        hostname=platform.node(),
        user=_user(),
        home=os.path.expanduser("~"),
        root=layout.root,
        root_writable=root.is_writable(layout.root),
        python_version=platform.python_version(),
        python_executable=sys.executable,
        platform=platform.platform(),
        clock_unix_s=time.time(),
        free_bytes=root.free_bytes(layout.root),
        quota_free_bytes=quota.quota_free_bytes(layout.root),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())
