"""An SSH server that asks: passwords, questions, a second step behind a key. sshd would need PAM and accounts for that.

Made of paramiko's server side, one thread a connection; commands go to /bin/sh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import paramiko

from orchestrator.ssh.settings import ConnectionSettings
from tests.support.sshd import HOST, make_key, public_half

USER = "scientist"


@dataclasses.dataclass
class Rules:
    """What opens the door. With `key` and `code` both are needed, the key first."""

    password: str | None = None
    code: str | None = None
    key: Path | None = None


class AskingServer:
    """A running server; `attempts` lists the methods that were tried, in order."""

    def __init__(self, folder: Path, rules: Rules) -> None:
        folder.mkdir()
        self.rules = rules
        self.attempts: list[str] = []
        self.host_key = make_key(folder / "host_key")
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(f"[{HOST}]:{self.port} {public_half(self.host_key)}\n")
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def settings(self, key: Path | None = None) -> ConnectionSettings:
        return ConnectionSettings(
            host=HOST,
            user=USER,
            port=self.port,
            identity_files=(key,) if key else (Path("/nonexistent/key"),),
            ssh_config_file=Path(os.devnull),
            known_hosts_files=(self.known_hosts,),
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for transport in self._transports:
            transport.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(paramiko.Ed25519Key.from_private_key_file(str(self.host_key)))
            self._transports.append(transport)
            with contextlib.suppress(paramiko.SSHException, EOFError):
                transport.start_server(server=_Doorman(self), event=threading.Event())


class _Doorman(paramiko.ServerInterface):
    def __init__(self, server: AskingServer) -> None:
        self._server = server
        self._key_shown = False

    def get_allowed_auths(self, username: str) -> str:
        rules = self._server.rules
        if rules.key and not self._key_shown:
            return "publickey"
        return ",".join(
            m for m, wanted in (("keyboard-interactive", rules.code), ("password", rules.password)) if wanted
        )

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._server.attempts.append("publickey")
        rules = self._server.rules
        if rules.key is None or f"{key.get_name()} {key.get_base64()}" != public_half(rules.key):
            return paramiko.AUTH_FAILED
        self._key_shown = True
        return paramiko.AUTH_PARTIALLY_SUCCESSFUL if rules.code or rules.password else paramiko.AUTH_SUCCESSFUL

    def check_auth_password(self, username: str, password: str) -> int:
        self._server.attempts.append("password")
        return paramiko.AUTH_SUCCESSFUL if password == self._server.rules.password else paramiko.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> int | paramiko.server.InteractiveQuery:
        self._server.attempts.append("keyboard-interactive")
        if self._server.rules.code is None:
            return paramiko.AUTH_FAILED
        return paramiko.server.InteractiveQuery("Second factor", "", ("One-time code: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return paramiko.AUTH_SUCCESSFUL if responses == [self._server.rules.code] else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=_execute, args=(channel, command.decode()), daemon=True).start()
        return True


def _execute(channel: paramiko.Channel, command: str) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(["/bin/sh", "-c", command], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        pumps = (
            (functools.partial(channel.recv, 65536), process.stdin.write, process.stdin),
            (functools.partial(os.read, process.stdout.fileno(), 65536), channel.sendall, None),
            (functools.partial(os.read, process.stderr.fileno(), 65536), channel.sendall_stderr, None),
        )
        threads = [threading.Thread(target=_pump, args=pump, daemon=True) for pump in pumps]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
    channel.send_exit_status(process.returncode)
    channel.close()


def _pump(read: Callable[[], bytes], write: Callable[[bytes], object], to: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError, ValueError):
        while part := read():
            write(part)
            if to is not None:
                to.flush()
    if to is not None:
        with contextlib.suppress(OSError):
            to.close()


@contextlib.contextmanager
def asking_server(folder: Path, rules: Rules) -> Iterator[AskingServer]:
    server = AskingServer(folder, rules)
    try:
        yield server
    finally:
        server.close()
