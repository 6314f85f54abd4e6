"""A real OpenSSH server on loopback: its own keys, its own configuration, nothing of the machine's."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.ssh.settings import ConnectionSettings

START_TIMEOUT_S = 20.0
HOST = "127.0.0.1"
_PRIVILEGE_SEPARATION_FOLDER = Path("/run/sshd")


def find_sshd() -> str:
    """The path of `sshd`. Fails the test where there is none: these tests prove nothing without it."""
    found = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
    if found is None:
        pytest.fail("these tests need OpenSSH's server: install the package `openssh-server`")
    return found


def find_program(name: str, package: str | None = None) -> str:
    """The path of a program that a test needs; fails the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"this test needs `{name}`: install the package `{package or name}`")
    return found


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "", extra: Sequence[str] = ()) -> Path:
    """A key pair made by `ssh-keygen`; returns the private key's path."""
    command = [find_program("ssh-keygen", "openssh-client"), "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", path]
    subprocess.run([*map(str, command), *extra], check=True, stdin=subprocess.DEVNULL, timeout=60)
    return path


def public_half(path: Path) -> str:
    """`type base64` of the public key beside `path`."""
    return " ".join(path.with_name(path.name + ".pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """As `ssh-keygen -l` tells it, the oracle for our own."""
    done = subprocess.run(["ssh-keygen", "-l", "-f", str(path)], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.split()[1]


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@dataclasses.dataclass
class Sshd:
    """A running server. `settings()` logs in with `client_key`; everything lies in `folder`."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    host_key: Path
    client_key: Path
    known_hosts: Path

    @property
    def home(self) -> Path:
        """Where its sessions are at home: none of the account's own start-up files lie there."""
        return self.folder / "home"

    @property
    def log(self) -> str:
        return (self.folder / "sshd.log").read_text("utf-8", "replace")

    def settings(self, **changes: object) -> ConnectionSettings:
        """Connection settings that reach this server and read nothing of the user's."""
        settings = ConnectionSettings(
            host=HOST,
            user=getpass.getuser(),
            port=self.port,
            identity_files=(self.client_key,),
            ssh_config_file=Path(os.devnull),
            known_hosts_files=(self.known_hosts,),
            connect_timeout_s=10.0,
            banner_timeout_s=10.0,
            auth_timeout_s=20.0,
        )
        return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]

    def authorise(self, key: Path, options: str = "") -> None:
        """Let `key` in; `options` as in authorized_keys, such as `command="…"`."""
        with (self.folder / "authorized_keys").open("a") as file:
            file.write(f"{options} {public_half(key)}\n".lstrip())

    def also_known_at(self, port: int) -> None:
        """Let the host key be known for `port` too, where a relay stands in front of this server."""
        known = self.known_hosts.read_text()
        self.known_hosts.write_text(known + known.replace(f":{self.port} ", f":{port} "))

    def session_pids(self) -> list[int]:
        """Processes of this server that serve connections."""
        return _descendants(self.process.pid)

    def kill_sessions(self) -> None:
        """End every connection without a word, as a crash would."""
        for pid in self.session_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the server and its connections."""
        self.process.kill()
        sessions = self.session_pids()
        self.process.wait()
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_sshd(folder: Path, options: Mapping[str, str] | None = None, port: int | None = None) -> Sshd:
    """Start a server in `folder` with `options` over the usual ones. Fails the test, with the log, if it does not come
    up."""
    binary = find_sshd()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.geteuid() == 0:
        _PRIVILEGE_SEPARATION_FOLDER.mkdir(mode=0o755, exist_ok=True)
    host_key, client_key = folder / "host_key", folder / "client_key"
    for key in (host_key, client_key):
        if not key.exists():
            make_key(key)
    port = port or free_port()
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(f"[{HOST}]:{port} {public_half(host_key)}\n")
    (folder / "authorized_keys").write_text(public_half(client_key) + "\n")
    config = {
        "Port": str(port),
        "ListenAddress": HOST,
        "HostKey": str(host_key),
        "PidFile": "none",
        "AuthorizedKeysFile": str(folder / "authorized_keys"),
        # The folder lies below /tmp, which sshd would not trust with keys.
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "MaxStartups": "100",
        "LogLevel": "VERBOSE",
        # Since 9.8 a server locks out an address whose logins fail, which here all tests share.
        "PerSourcePenalties": "no",
        **(options or {}),
    }
    # The account's own start-up files are no part of a test, and may take longer than what it does.
    (folder / "home").mkdir(exist_ok=True)
    config["SetEnv"] = f'"HOME={folder / "home"}" {config.get("SetEnv", "")}'.strip()
    if not _accepts(binary, folder, config):
        del config["PerSourcePenalties"]
    path = _write_config(folder, config)
    with (folder / "sshd.log").open("ab") as log:
        process = subprocess.Popen(
            [binary, "-D", "-e", "-f", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    server = Sshd(folder, port, process, host_key, client_key, known_hosts)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _greets(port):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            pytest.fail(f"{binary} does not start with {path}:\n{server.log[-3000:]}")
        time.sleep(0.02)
    return server


@contextlib.contextmanager
def running_sshd(folder: Path, options: Mapping[str, str] | None = None) -> Iterator[Sshd]:
    server = start_sshd(folder, options)
    try:
        yield server
    finally:
        server.stop()


def login_shell_option(shell: str, home: Path) -> str:
    """The authorized_keys option that makes `shell` the login shell: it gets the command as sshd hands it over, and
    its start-up files in `home` talk on both streams."""
    environment = {"HOME": home, "ZDOTDIR": home, "XDG_CONFIG_HOME": home, "BASH_ENV": home / "noise.sh"}
    words = [f"{name}={shlex.quote(str(value))}" for name, value in environment.items()]
    command = f'echo a banner; echo a banner >&2; exec env {" ".join(words)} {shell} -c "$SSH_ORIGINAL_COMMAND"'
    escaped = command.replace("\\", "\\\\").replace('"', '\\"')
    return f'command="{escaped}"'


def make_noisy_home(home: Path) -> Path:
    """Start-up files of every shell, each talking on both streams."""
    (home / "fish").mkdir(parents=True)
    plain = "echo noise from a start-up file\necho noise from a start-up file >&2\n"
    for name in ("noise.sh", ".zshenv", "fish/config.fish"):
        (home / name).write_text(plain)
    for name in (".cshrc", ".tcshrc"):
        (home / name).write_text("echo noise from a start-up file\nsh -c 'echo noise from a start-up file >&2'\n")
    return home


def _write_config(folder: Path, config: Mapping[str, str]) -> Path:
    path = folder / "sshd_config"
    path.write_text("".join(f"{name} {value}\n" for name, value in config.items()))
    return path


def _accepts(binary: str, folder: Path, config: Mapping[str, str]) -> bool:
    path = _write_config(folder, config)
    return subprocess.run([binary, "-t", "-f", str(path)], capture_output=True, timeout=60).returncode == 0


def _greets(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=2.0) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _descendants(root: int) -> list[int]:
    listing = subprocess.run(
        [find_program("ps", "procps"), "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True, timeout=60
    )
    children: dict[int, list[int]] = {}
    for line in listing.stdout.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found, waiting = [], [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.append(child)
            waiting.append(child)
    return found
