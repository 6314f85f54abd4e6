"""What a user would do instead: the commands, and how to watch a process that may have to be stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.transfer_site import GCM, Site

_PARAMIKO = """
import sys, paramiko
host, port, user, key, known, source, target = sys.argv[1:]
client = paramiko.SSHClient()
client.load_host_keys(known)
client.connect(host, int(port), user, key_filename=key, look_for_keys=False, allow_agent=False)
client.open_sftp().put(source, target)
client.close()
"""
_FABRIC = """
import sys, fabric
host, port, user, key, known, source, target = sys.argv[1:]
with fabric.Connection(host, user, int(port), connect_kwargs={
    "key_filename": key, "look_for_keys": False, "allow_agent": False}) as connection:
    connection.client.load_host_keys(known)
    connection.put(source, target)
"""
_PARAMIKO_CIPHER = """
import sys, paramiko
host, port, user, key, known = sys.argv[1:]
client = paramiko.SSHClient()
client.load_host_keys(known)
client.connect(host, int(port), user, key_filename=key, look_for_keys=False, allow_agent=False)
print(client.get_transport().local_cipher)
"""


@dataclasses.dataclass(frozen=True)
class Rival:
    """`command(site, file)` puts `file` at the site's target. `program`: what must be installed."""

    name: str
    program: str
    command: Callable[[Site, Path], list[str]]
    cipher: str = GCM


@dataclasses.dataclass(frozen=True)
class Ended:
    """`arrived_bytes` of the target when the process had ended, or was stopped after `seconds`."""

    seconds: float
    arrived_bytes: int
    was_stopped: bool

    @property
    def rate(self) -> float:
        return self.arrived_bytes / self.seconds


def _ssh(site: Site) -> list[str]:
    return ["ssh", *site.ssh_options(), "-p", str(site.port)]


def _ssh_cat(site: Site, file: Path) -> list[str]:
    there = shlex.join([*_ssh(site), site.login, f"cat > {shlex.quote(str(site.target))}"])
    return ["sh", "-c", f"exec {there} < {shlex.quote(str(file))}"]


def _scp(site: Site, file: Path) -> list[str]:
    return ["scp", "-q", *site.ssh_options(), "-P", str(site.port), str(file), f"{site.login}:{site.target}"]


def _scp_verified(site: Site, file: Path) -> list[str]:
    here = f"sha256sum < {shlex.quote(str(file))}"
    there = shlex.join([*_ssh(site), site.login, f"sha256sum < {shlex.quote(str(site.target))}"])
    return ["bash", "-c", f"{shlex.join(_scp(site, file))} && cmp <({here}) <({there})"]


def rsync_command(site: Site, file: Path, *options: str) -> list[str]:
    """`rsync`, which keeps the file's time stamp, with more options."""
    shell = shlex.join(_ssh(site))
    return ["rsync", "-t", *options, "-e", shell, str(file), f"{site.login}:{site.target}"]


def _rclone(site: Site, file: Path) -> list[str]:
    where = [
        *("--sftp-host", site.link.address, "--sftp-port", str(site.port), "--sftp-user", site.login.split("@")[0]),
        *("--sftp-key-file", str(site.key), "--sftp-known-hosts-file", str(site.known_hosts)),
        *("--config", os.devnull, "--no-traverse", "--ignore-times"),
    ]
    return ["rclone", "copyto", *where, str(file), f":sftp:{site.target}"]


def _python(code: str) -> Callable[[Site, Path], list[str]]:
    def command(site: Site, file: Path) -> list[str]:
        login = [site.link.address, str(site.port), site.login.split("@")[0], str(site.key), str(site.known_hosts)]
        return [sys.executable, "-c", code, *login, str(file), str(site.target)]

    return command


SSH_CAT = Rival("ssh cat", "ssh", _ssh_cat)
SCP = Rival("scp", "scp", _scp)
SCP_VERIFIED = Rival("scp, then sha256sum at both ends", "scp", _scp_verified)
RSYNC = Rival("rsync", "rsync", lambda site, file: rsync_command(site, file))
RCLONE = Rival("rclone sftp", "rclone", _rclone, "its own first choice")
PARAMIKO = Rival("paramiko put", sys.executable, _python(_PARAMIKO), "")
FABRIC = Rival("Fabric put", sys.executable, _python(_FABRIC), "")


def is_installed(rival: Rival) -> bool:
    return shutil.which(rival.program) is not None


def paramiko_cipher(site: Site) -> str:
    """What paramiko, and so Fabric, agrees on with this server."""
    login = [site.link.address, str(site.port), site.login.split("@")[0], str(site.key), str(site.known_hosts)]
    command = [*site.link.near, sys.executable, "-c", _PARAMIKO_CIPHER, *login]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def run_rival(rival: Rival, site: Site, file: Path, limit_s: float) -> Ended:
    """Send `file` anew; after `limit_s` it is stopped, and what has arrived counts."""
    site.clear()
    ended = run_watched([*site.link.near, *rival.command(site, file)], limit_s, site.target)
    if not ended.was_stopped and ended.arrived_bytes != file.stat().st_size:
        raise RuntimeError(f"{rival.name} put {ended.arrived_bytes} bytes there")
    return ended


def run_watched(command: Sequence[str], limit_s: float, target: Path) -> Ended:
    """Run a command that must succeed in the time it has. Raises `RuntimeError` where it fails."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, error = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        seconds = time.monotonic() - began
        arrived = _arrived(target)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Ended(seconds, arrived, was_stopped=True)
    seconds = time.monotonic() - began
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {error.decode(errors='replace')[-2000:]}")
    return Ended(seconds, _arrived(target), was_stopped=False)


def _arrived(target: Path) -> int:
    """Bytes at the target, or in the file that rsync and rclone write beside it first."""
    sizes = [path.stat().st_blocks * 512 for path in target.parent.iterdir() if target.name in path.name]
    if target.exists():
        return target.stat().st_size
    return max(sizes, default=0)
