"""Questions of OpenSSH's client, put to our `Prompt`.

The client runs a helper (SSH_ASKPASS) for each question; the helper hands it to us over a Unix socket in a private
folder. Answers are never in arguments, environment or files.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.ssh.settings import HostKeyPolicy, Prompt
from remote_payload.wire.names import printable

_SOCKET_VARIABLE = "REMOTE_EVAL_ASKPASS"
_MAX_QUESTION_BYTES = 64 * 1024
_EXCHANGE_TIMEOUT_S = 5.0

# Runs isolated, with nothing of ours importable: it sends `<kind>\0<question>` and prints what comes back, if anything.
_HELPER = f"""
import os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["{_SOCKET_VARIABLE}"])
    question = os.environ.get("SSH_ASKPASS_PROMPT", "") + "\\0" + " ".join(sys.argv[1:])
    data = question.encode("utf-8", "surrogateescape")
    s.sendall(struct.pack(">I", len(data)) + data)
    answer = b""
    while True:
        part = s.recv(65536)
        if not part:
            break
        answer += part
if not answer.startswith(b"+"):
    sys.exit(1)
sys.stdout.buffer.write(answer[1:] + b"\\n")
"""


class AskpassServer:
    """Answers the helper for the duration of one login. `no_answer`: a question found nobody to answer it, and
    `on_no_answer` was called before the client could go on without."""

    def __init__(self, folder: Path, prompt: Prompt, policy: HostKeyPolicy) -> None:
        self._prompt = prompt
        self._policy = policy
        self._helper = folder / "askpass"
        self._path = folder / "a"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen(4)
        self._ended = False
        self._asking_since: float | None = None
        self._asked_s = 0.0
        self.no_answer = False
        self.questions: list[str] = []
        self.on_no_answer: Callable[[], None] = lambda: None
        self._helper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -c {shlex.quote(_HELPER)} "$@"\n')
        self._helper.chmod(0o700)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def environment(self) -> dict[str, str]:
        """Variables that make the client use the helper. DISPLAY is what versions before 8.4 want to see."""
        return {
            "SSH_ASKPASS": str(self._helper),
            "SSH_ASKPASS_REQUIRE": "force",
            "DISPLAY": ":0",
            _SOCKET_VARIABLE: str(self._path),
        }

    @property
    def asked_s(self) -> float:
        """Seconds that people took to answer so far; they do not count as waiting for the server."""
        since = self._asking_since
        return self._asked_s + (time.monotonic() - since if since is not None else 0.0)

    def close(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            # Wakes accept(), which closing alone does not do everywhere.
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(str(self._path))
        self._thread.join(_EXCHANGE_TIMEOUT_S)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._helper.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._ended:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, EOFError, struct.error):
                if not self._ended:
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_EXCHANGE_TIMEOUT_S)
        (length,) = struct.unpack(">I", _exactly(connection, 4))
        kind, _, question = _exactly(connection, min(length, _MAX_QUESTION_BYTES)).partition(b"\0")
        text = printable(question.decode("utf-8", "replace")).strip()
        if kind == b"none":
            # A notice ("confirm user presence", touch the key): the client ends the helper when it has happened.
            sys.stderr.write(text + "\n")
            connection.settimeout(None)
            connection.recv(1)
            return
        is_host_key = "(yes/no" in text
        if is_host_key and self._policy == "strict":
            # The target's own ssh never asks under this policy; a ProxyCommand of the user's may run one that does.
            connection.sendall(b"+no")
            return
        self.questions.append(text)
        self._asking_since = time.monotonic()
        try:
            answer = self._prompt(text + " ", is_host_key)
        finally:
            self._asked_s += time.monotonic() - self._asking_since
            self._asking_since = None
        if answer is None:
            self.no_answer = True
            self.on_no_answer()
            return
        connection.sendall(b"+" + answer.encode())


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the helper went away")
        data += part
    return data
