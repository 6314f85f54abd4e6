"""A node to send to: a real `sshd` with keys of its own at the far end of a link, and folders for what arrives."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.transfer_link import Link
from remote_payload.wire.layout import MARKER_NAME, NodeLayout

GCM = "aes128-gcm@openssh.com"
_START_S = 20.0


@dataclasses.dataclass
class Site:
    """Everything lies in `folder`: `here/` is the sending side's, `there/` the node's."""

    folder: Path
    link: Link
    port: int
    server: subprocess.Popen[bytes]

    @property
    def key(self) -> Path:
        return self.folder / "client_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def there(self) -> Path:
        return self.folder / "there"

    @property
    def node_root(self) -> Path:
        return self.there / "root"

    @property
    def target(self) -> Path:
        """Where a rival puts the file."""
        return self.there / "target"

    @property
    def home(self) -> Path:
        """What our client remembers."""
        return self.folder / "home"

    def ssh_options(self) -> list[str]:
        return [
            *("-F", os.devnull, "-i", str(self.key), "-c", GCM, "-o", "BatchMode=yes"),
            *("-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={self.known_hosts}"),
        ]

    @property
    def login(self) -> str:
        return f"{getpass.getuser()}@{self.link.address}"

    def session_pids(self) -> list[int]:
        """Processes below the server: its side of every connection, and what runs there."""
        return descendants(self.server.pid)

    def cut(self) -> None:
        """End every connection without a word, as a link does; what ran behind it sees the end of its input."""
        for pid in self.session_pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    os.kill(pid, signal.SIGKILL)

    def clear(self) -> None:
        """Remove what has arrived, and what our client remembers of files."""
        self.target.unlink(missing_ok=True)
        kept = {Path(NodeLayout(str(self.node_root)).payloads).name, MARKER_NAME}
        for place in self.node_root.iterdir() if self.node_root.exists() else ():
            if place.name in kept:
                continue
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()
        for path in (self.home / "cache").glob("*.sqlite3*"):
            path.unlink()


@contextlib.contextmanager
def open_site(folder: Path, link: Link) -> Iterator[Site]:
    """Start the server at the far end of the link. Raises `RuntimeError`, with its log, where it does not come up."""
    binary = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
    if binary is None:
        raise RuntimeError("this needs OpenSSH's server: install openssh-server")
    folder.mkdir(parents=True, mode=0o700)
    (folder / "there").mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
    for name in ("host_key", "client_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name)]
        subprocess.run(make, check=True, stdin=subprocess.DEVNULL, timeout=60)
    port = _free_port()
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[{link.address}]:{port} {public}")
    (folder / "authorized_keys").write_text((folder / "client_key.pub").read_text())
    config = {
        "Port": port,
        "ListenAddress": link.address,
        "HostKey": folder / "host_key",
        "PidFile": "none",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no",
        "UsePAM": "no",
        "UseDNS": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
    }
    path = folder / "sshd_config"
    # Since 9.8 a server shuts out an address whose connections end badly, which is what cuts look like.
    for extra in ("PerSourcePenalties no\n", ""):
        path.write_text("".join(f"{name} {value}\n" for name, value in config.items()) + extra)
        if _status([binary, "-t", "-f", str(path)]) == 0:
            break
    with (folder / "sshd.log").open("wb") as log:
        words = [*link.far, binary, "-D", "-e", "-f", str(path)]
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    site = Site(folder, link, port, server)
    try:
        _await_server(site)
        yield site
    finally:
        sessions = site.session_pids()
        server.kill()
        server.wait()
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        children = parents.get(pending.pop(), [])
        found += children
        pending += children
    return found


def _await_server(site: Site) -> None:
    probe = [*site.link.near, "ssh", *site.ssh_options(), "-p", str(site.port), site.login, "true"]
    deadline = time.monotonic() + _START_S
    while _status(probe) != 0:
        if site.server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"sshd does not start:\n{(site.folder / 'sshd.log').read_text()[-3000:]}")
        time.sleep(0.05)


def _status(command: Sequence[str]) -> int:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60
    )
    return done.returncode


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
