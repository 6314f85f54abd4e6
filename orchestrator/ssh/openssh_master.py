"""The one login of the OpenSSH transport: a ControlMaster of our own, which every command then goes through."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from orchestrator.errors import ConfigurationError, ConnectionLostError, LoginRefusedError, UnreachableError
from orchestrator.ssh import openssh_messages
from orchestrator.ssh.askpass import AskpassServer
from orchestrator.ssh.config import EffectiveConfig, find_ssh, ssh_arguments
from orchestrator.ssh.known_hosts import KnownHost, read_known_hosts
from orchestrator.ssh.settings import ConnectionSettings, Prompt

CONTROL_PERSIST_S = 600
"""A master that its client left behind (killed, power cut) ends itself after this long without a session."""

_SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_CONTROL_TIMEOUT_S = 10.0
_POLL_S = 0.02
_LONGEST_PERSON_WAIT_S = 300.0
_LONGEST_SOCKET_PATH = 103
_TEMPORARY_SUFFIX = 18  # ssh binds ControlPath + "." + 16 random characters first
_MAX_LOG_BYTES = 1024 * 1024


class Master:
    """A running ControlMaster. `command_prefix()` starts a session on it and on nothing else."""

    def __init__(self, binary: str, folder: Path, host: str) -> None:
        self._binary = binary
        self._host = host
        self.folder = folder

    @property
    def control_path(self) -> Path:
        return self.folder / "c"

    def command_prefix(self, log: Path) -> list[str]:
        """`ssh` up to the remote command. It reads no configuration, and should the master be gone it fails instead of
        logging in anew."""
        options = option_words(
            ControlPath=_quoted(self.control_path), ControlMaster="no", BatchMode="yes", ProxyCommand="exit 1"
        )
        return [self._binary, "-F", os.devnull, "-E", str(log), "-T", *options, "--", self._host]

    def close(self) -> None:
        """End the master and remove its folder. Never raises."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._control("exit")
        shutil.rmtree(self.folder, ignore_errors=True)

    def answers(self) -> bool:
        """Whether the master's process is there; the connection behind it may be dead all the same."""
        try:
            return self._control("check").returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False

    def _control(self, request: str) -> subprocess.CompletedProcess[bytes]:
        path = option_words(ControlPath=_quoted(self.control_path))
        return subprocess.run(
            [self._binary, "-F", os.devnull, *path, "-O", request, "--", self._host],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CONTROL_TIMEOUT_S,
            check=False,
        )


def start_master(
    settings: ConnectionSettings, effective: EffectiveConfig, prompt: Prompt, sockets_folder: Path
) -> Master:
    """Log in with the system's `ssh`. One try; raises the diagnosed error."""
    binary = find_ssh()
    if binary is None:
        raise ConfigurationError("transport: openssh needs an `ssh` program", action="Install OpenSSH's client.")
    folder = private_folder(sockets_folder)
    master = Master(binary, folder, settings.host)
    try:
        askpass = AskpassServer(folder, prompt, settings.host_key_policy)
        with contextlib.closing(askpass):
            _log_in(binary, settings, effective, master, askpass)
    except BaseException:
        master.close()
        raise
    return master


def _log_in(
    binary: str, settings: ConnectionSettings, effective: EffectiveConfig, master: Master, askpass: AskpassServer
) -> None:
    log = master.folder / "login.log"
    options = _login_options(settings, master.control_path)
    if effective.proxy_jump:
        settings = dataclasses.replace(settings, ssh_config_file=hardened_config(settings, master.folder))
    # The first value wins in ssh, so ours stand before -F and what it holds.
    command = [binary, "-f", "-N", "-T", *options, *ssh_arguments(settings), "--", settings.host]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=_environment(askpass),
            start_new_session=True,
        )
    askpass.on_no_answer = process.terminate
    in_time = _wait(process, settings, askpass)
    text = log.read_bytes()[-_MAX_LOG_BYTES:].decode("utf-8", "replace")
    log.unlink()
    if askpass.no_answer:
        record = openssh_messages.login_record(text)
        raise LoginRefusedError(
            f"{effective.description} asks a question, and there is no terminal to ask on: {askpass.questions[-1]}",
            action="Run on a terminal, or use a key that needs no passphrase here (`ssh-add`).",
            details="\n".join(record.server_words),
        )
    if not in_time:
        raise UnreachableError(
            f"{effective.description} did not finish the login in time",
            action="Check that the machine is up, and that the VPN or jump host that leads to it works.",
            details="\n".join(openssh_messages.plain_lines(text)),
        )
    if process.returncode != 0:
        known: tuple[KnownHost, ...] = ()
        with contextlib.suppress(OSError):
            known = read_known_hosts(effective.known_hosts_files)
        raise openssh_messages.login_failure(text, effective, known)
    if not master.answers():
        raise ConnectionLostError(
            f"{effective.description} ended the connection right after the login",
            action="Check the network and whether the node lets this account stay logged in.",
            details=text[-2000:],
        )


def _login_options(settings: ConnectionSettings, control_path: Path) -> list[str]:
    control = option_words(
        ControlMaster="yes", ControlPath=_quoted(control_path), ControlPersist=str(CONTROL_PERSIST_S)
    )
    return [*control, *hardened_options(settings)]


def hardened_options(settings: ConnectionSettings) -> list[str]:
    """What holds for every login to the node itself, whatever the configuration says."""
    options = option_words(
        ClearAllForwardings="yes",
        RemoteCommand="none",
        RequestTTY="no",
        # The log is read when the login fails: which keys were offered, what the server allows.
        LogLevel="DEBUG1",
        **_options_for_every_hop(settings),
    )
    if settings.identity_files:
        options += option_words(IdentitiesOnly="yes")
        for path in settings.identity_files:
            options += option_words(IdentityFile=_quoted(path))
    return options


def hardened_config(settings: ConnectionSettings, folder: Path) -> Path:
    """A configuration file that includes the usual ones behind what must hold for jump hosts too: the `ssh` that
    reaches a jump host is given the file, and none of our options."""
    lines = ["Host *"]
    lines += [f"  {name} {value}" for name, value in _options_for_every_hop(settings).items()]
    included = [settings.ssh_config_file] if settings.ssh_config_file else [Path.home() / ".ssh/config", _SYSTEM_CONFIG]
    lines += [f'  Include "{path}"' for path in included]
    path = folder / "config"
    path.write_text("\n".join(lines) + "\n")
    return path


def _options_for_every_hop(settings: ConnectionSettings) -> dict[str, str]:
    options = {
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "Tunnel": "no",
        "PermitLocalCommand": "no",
        "UpdateHostKeys": "no",
        "StrictHostKeyChecking": "ask" if settings.host_key_policy == "ask" else "yes",
        "NumberOfPasswordPrompts": "1",
        "ConnectionAttempts": "1",
        "ConnectTimeout": str(math.ceil(settings.connect_timeout_s)),
        "ServerAliveInterval": str(max(1, round(settings.keepalive_s))),
        "ServerAliveCountMax": "3",
    }
    if settings.known_hosts_files:
        options["UserKnownHostsFile"] = " ".join(_quoted(path) for path in settings.known_hosts_files)
        options["GlobalKnownHostsFile"] = os.devnull
    return options


def _wait(process: subprocess.Popen[bytes], settings: ConnectionSettings, askpass: AskpassServer) -> bool:
    """Wait for the login's end. False: it took too long, and is ended; a person's time is counted apart."""
    limit_s = settings.connect_timeout_s + settings.banner_timeout_s + settings.auth_timeout_s
    began = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - began > limit_s + min(askpass.asked_s, _LONGEST_PERSON_WAIT_S):
            # The whole group: a ProxyCommand or jump host's ssh goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        time.sleep(_POLL_S)
    return True


def _environment(askpass: AskpassServer) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(askpass.environment())
    environment["LC_ALL"] = "C"
    return environment


def private_folder(sockets_folder: Path) -> Path:
    """A folder of our own for one master; in /tmp where the usual place has too long a path for a Unix socket."""
    sockets_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = sockets_folder / secrets.token_hex(4)
    if len(os.fsencode(folder / "c")) + _TEMPORARY_SUFFIX > _LONGEST_SOCKET_PATH:
        return Path(tempfile.mkdtemp(prefix="re-", dir="/tmp"))
    folder.mkdir(mode=0o700)
    return folder


def option_words(**options: str) -> list[str]:
    """Options as words of ssh's command line."""
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _quoted(path: Path) -> str:
    """A path as an option's value: quoted for spaces, its percent signs kept from being tokens."""
    return '"' + str(path.absolute()).replace("%", "%%") + '"'
