"""Another node's agent, reached by this account's own `ssh`: its keys, its known hosts, its configuration."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import threading
import time
from types import TracebackType
from typing import Optional

from remote_payload.agent.channel import FdChannel, PeerGoneError, widen
from remote_payload.agent.commands import ask
from remote_payload.agent.failure import AgentError
from remote_payload.wire.forward import OTHER_MACHINE, ForwardRequest, SshLogin, check_login
from remote_payload.wire.names import check_nonce, printable

_READY = "ready"
_FAST_CIPHER = "aes128-gcm@openssh.com"
_CONFIG_LIMIT_S = 5.0
_START_LIMIT_S = 45.0
"""Less than the client waits for an answer, so that it hears why there is none."""
_NOISE_BYTES = 1024 * 1024
_SAID_BYTES = 4000
_SHOWN_CHARACTERS = 300
_END_S = 2.0


def login_command(login: SshLogin, command: str) -> list[str]:
    """`ssh` that logs in without a person, with what the account has, once, to a host that it knows; or not at all.
    The fastest cipher goes first, where the account's configuration has it.

    Raises `WireError` for a login that is none.
    """
    check_login(login)
    to_host = ["-l", login.user, "-p", str(login.port), "--", login.host]
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "PreferredAuthentications": "gssapi-with-mic,hostbased,publickey",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "Tunnel": "no",
        "PermitLocalCommand": "no",
        "ControlMaster": "no",
        "ControlPath": "none",
        "Compression": "no",
        "ConnectTimeout": str(math.ceil(login.connect_timeout_s)),
        "ConnectionAttempts": "1",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
    }
    configured = re.search(r"^ciphers (\S+)$", ask(["ssh", "-G", *to_host], _CONFIG_LIMIT_S) or "", re.MULTILINE)
    ciphers = configured.group(1).split(",") if configured else []
    if _FAST_CIPHER in ciphers:
        options["Ciphers"] = ",".join([_FAST_CIPHER, *(cipher for cipher in ciphers if cipher != _FAST_CIPHER)])
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", "-a", "-x", *words, *to_host, command]


class FarNode:
    """An `ssh` process and the agent behind it. Leaving the context ends both.

    Its methods raise `AgentError` (unfit, with the reason in one line) where the login or the agent's start fails.
    """

    def __init__(self, request: ForwardRequest) -> None:
        self._nonce = check_nonce(request.nonce)
        self._said = b""
        try:
            process = subprocess.Popen(
                login_command(request.login, request.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,  # what its configuration starts ends with it
            )
        except OSError as error:
            raise AgentError("unfit", f"there is no ssh that can be started on this node: {error.strerror}") from error
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AgentError("unfit", "ssh has no pipes")
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
            widen(pipe.fileno())
        self.channel = FdChannel(self._stdout.fileno(), self._stdin.fileno())
        self._listener = threading.Thread(target=self._listen, name="ssh-words", daemon=True)
        self._listener.start()

    def start(self, script: str, idle_s: float) -> None:
        """Return when the agent that `script` starts is ready. Silence of `idle_s` ends the channel from then on."""
        deadline = time.monotonic() + _START_LIMIT_S
        seen = b"\n"
        line = re.compile(rb"\n=remote-eval=%s=([a-z-]+)=\n\Z" % self._nonce.encode())
        byte = bytearray(1)
        try:
            self.channel.idle_s = _START_LIMIT_S
            self.channel.send(script.encode("utf-8", "surrogateescape"))
            while not (said := line.search(seen[-200:])) and len(seen) < _NOISE_BYTES:
                self.channel.idle_s = max(0.0, deadline - time.monotonic())
                self.channel.fill(memoryview(byte))
                seen += byte
        except PeerGoneError as error:
            raise AgentError("unfit", self.last_words() or "nothing came from there") from error
        outcome = said.group(1).decode() if said else ""
        if outcome == OTHER_MACHINE:
            raise AgentError("unfit", "from there the name leads to another machine")
        if outcome != _READY:
            raise AgentError("unfit", f"the agent does not start that way ({outcome or 'it prints without end'})")
        self.channel.idle_s = idle_s

    def close_write(self) -> None:
        """The far agent sees the end of its input, and journals what it has."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def last_words(self) -> str:
        """The last line that ssh said, once it has ended or soon will."""
        self._listener.join(_END_S)
        lines = printable(self._said.decode("utf-8", "replace").replace("\r\n", "\n")).split("\n")
        return next((line.strip()[:_SHOWN_CHARACTERS] for line in reversed(lines) if line.strip()), "")

    def __enter__(self) -> FarNode:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        while data := self._stderr.read(4096):
            self._said = (self._said + data)[-_SAID_BYTES:]
