"""An account on a node with an `ssh` of its own: a key, known hosts, and nothing of the developer's.

`ssh` takes its home from the password file, so a node's account differs here by what it finds first in PATH.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.sshd import Sshd, find_program


@dataclasses.dataclass
class OwnSsh:
    """`options` makes a server's sessions find it. Every start is noted."""

    folder: Path

    @property
    def options(self) -> dict[str, str]:
        return {"SetEnv": f"PATH={self.folder}:{os.environ['PATH']}"}

    @property
    def calls(self) -> list[str]:
        """What its logins were told."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("-G ")]

    def may_log_in_to(
        self, server: Sshd, *, knows_host: bool = True, has_key: bool = True, more: Sequence[str] = ()
    ) -> None:
        """Give the account a key for `server`, and the server's host key, or not; `more` lines of configuration."""
        known = server.known_hosts.read_text() if knows_host else ""
        (self.folder / "known_hosts").write_text(known)
        key = server.client_key if has_key else server.host_key
        lines = [
            "Host *",
            f"  IdentityFile {key}",
            "  IdentitiesOnly yes",
            "  IdentityAgent none",
            f"  UserKnownHostsFile {self.folder / 'known_hosts'}",
            f"  GlobalKnownHostsFile {os.devnull}",
            *more,
        ]
        (self.folder / "config").write_text("\n".join(lines) + "\n")

    def pids(self) -> list[int]:
        """Its processes that run now."""
        listed = subprocess.run(
            [find_program("ps", "procps"), "-ww", "-eo", "pid=,args="],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        lines = [line.split(None, 1) for line in listed.splitlines()]
        return [int(pid) for pid, words in lines if f"-F {self.folder / 'config'} " in words]

    def kill(self) -> list[int]:
        """Which were ended."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids


def make_own_ssh(folder: Path) -> OwnSsh:
    folder.mkdir()
    real = find_program("ssh", "openssh-client")
    config, calls = shlex.quote(str(folder / "config")), shlex.quote(str(folder / "calls"))
    script = folder / "ssh"
    script.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec {real} -F {config} "$@"\n')
    script.chmod(0o755)
    return OwnSsh(folder)
