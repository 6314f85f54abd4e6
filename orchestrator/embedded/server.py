"""The server of the embedded node: sshd's part in a few lines, for one user, one key and commands only."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import asyncssh

from orchestrator.embedded.files import EmbeddedFiles, ServerState, take_lock

_READ_BYTES = 64 * 1024
_CHECK_IDLE_EVERY_S = 1.0
_LOGIN_TIMEOUT_S = 30.0
_KEEPALIVE_S = 15.0
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "SHELL", "TMPDIR", "TZ", "USER")

_log = logging.getLogger("remote-eval.embedded")


def serve(folder: Path, idle_limit_s: float) -> int:
    """Serve until idle for `idle_limit_s` or told to end (SIGTERM). 0 also where another server is there already."""
    files = EmbeddedFiles(folder)
    lock = take_lock(files.server_lock)
    if lock is None:
        return 0
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(_serve(files, idle_limit_s))
    return 0


class _Attendance:
    """How many connections there are, and since when there is none."""

    def __init__(self) -> None:
        self._count = 0
        self._empty_since = time.monotonic()

    def came(self) -> None:
        self._count += 1

    def left(self) -> None:
        self._count -= 1
        self._empty_since = time.monotonic()

    def idle_s(self) -> float:
        return 0.0 if self._count else time.monotonic() - self._empty_since


class _Server(asyncssh.SSHServer):
    """Lets one user in with one key. Forwarding of any kind is refused, which is asyncssh's default."""

    def __init__(self, user: str, client_key: asyncssh.SSHKey, attendance: _Attendance) -> None:
        self._user = user
        self._client_key = client_key
        self._attendance = attendance

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:  # noqa: ARG002
        self._attendance.came()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._attendance.left()

    def begin_auth(self, username: str) -> bool:  # noqa: ARG002
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == self._user and key.public_data == self._client_key.public_data


async def _serve(files: EmbeddedFiles, idle_limit_s: float) -> None:
    attendance = _Attendance()
    user = getpass.getuser()
    client_key = asyncssh.read_public_key(files.client_key.with_suffix(".pub"))
    listener = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: _Server(user, client_key, attendance),
        server_host_keys=[str(files.host_key)],
        process_factory=_run_command,
        encoding=None,
        config=None,
        allow_pty=False,
        line_editor=False,
        agent_forwarding=False,
        x11_forwarding=False,
        allow_scp=False,
        password_auth=False,
        kbdint_auth=False,
        host_based_auth=False,
        gss_host=None,
        login_timeout=_LOGIN_TIMEOUT_S,
        keepalive_interval=_KEEPALIVE_S,
    )
    told_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end.set)
    files.write_state(ServerState(os.getpid(), listener.get_port(), secrets.token_hex(16)))
    try:
        while not told_to_end.is_set() and attendance.idle_s() < idle_limit_s:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(told_to_end.wait(), min(_CHECK_IDLE_EVERY_S, idle_limit_s))
    finally:
        # Gone from the state first: nobody is sent to a server that no longer listens.
        files.state.unlink(missing_ok=True)
        listener.close()


async def _run_command(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """Run one command through /bin/sh and report its true end."""
    if process.command is None or process.subsystem is not None:
        process.stderr.write(b"this node runs commands only\n")
        process.exit(1)
        return
    try:
        child = _spawn(process.command)
    except OSError as error:
        process.stderr.write(f"the command cannot be started: {error.strerror}\n".encode())
        process.exit(126)
        return
    pipes = _Pipes()
    try:
        await pipes.open(child)
        work = asyncio.ensure_future(_carry(process, child, pipes))
        gone = asyncio.ensure_future(process.channel.wait_closed())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, gone):
            task.cancel()
        for task in (work, gone):
            with contextlib.suppress(asyncio.CancelledError, asyncssh.Error, OSError):
                await task
    finally:
        # With the client gone the command meets end of file and SIGPIPE, as under sshd; it is not killed.
        pipes.close()


async def _carry(process: asyncssh.SSHServerProcess[bytes], child: subprocess.Popen[bytes], pipes: _Pipes) -> None:
    ended = _end_of(child)
    feeding = asyncio.ensure_future(_feed(process, child, pipes))
    try:
        await asyncio.gather(_bring(pipes.stdout, process.stdout), _bring(pipes.stderr, process.stderr))
        code = await ended
    finally:
        feeding.cancel()
    if code >= 0:
        process.exit(code)
    else:
        process.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))


async def _feed(process: asyncssh.SSHServerProcess[bytes], child: subprocess.Popen[bytes], pipes: _Pipes) -> None:
    """The client's data to the command's standard input, then end of file."""
    listening = True
    while True:
        try:
            data = await process.stdin.read(_READ_BYTES)
        except asyncssh.SignalReceived as request:
            number = getattr(signal, f"SIG{request.signal}", None)
            if isinstance(number, signal.Signals):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            continue
        except (asyncssh.BreakReceived, asyncssh.TerminalSizeChanged):
            continue
        if not data:
            break
        if listening:
            # A command that reads no further is no reason to stop taking in what the client sends.
            listening = await pipes.write(data)
    pipes.close_stdin()


async def _bring(reader: asyncio.StreamReader, writer: asyncssh.SSHWriter[bytes]) -> None:
    while data := await reader.read(_READ_BYTES):
        writer.write(data)
        await writer.drain()


class _Pipes(asyncio.Protocol):
    """Our ends of a command's three pipes, each of which can be closed while the command lives."""

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()
        self._transports: list[asyncio.BaseTransport] = []
        self._stdin: asyncio.WriteTransport | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._broken = False

    async def open(self, child: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        self._stdin, _ = await loop.connect_write_pipe(lambda: self, child.stdin)
        self._transports.append(self._stdin)
        for reader, pipe in ((self.stdout, child.stdout), (self.stderr, child.stderr)):
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await loop.connect_read_pipe(lambda protocol=protocol: protocol, pipe)  # type: ignore[misc]
            self._transports.append(transport)

    async def write(self, data: bytes) -> bool:
        """Send to the command. False: it has closed its standard input."""
        if self._stdin is None or self._broken or self._stdin.is_closing():
            return False
        self._stdin.write(data)
        await self._may_write.wait()
        return not self._broken

    def close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()

    def close(self) -> None:
        for transport in self._transports:
            transport.close()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._broken = True
        self._may_write.set()


def _spawn(command: str) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # `python3` is the interpreter that runs this program: the one that has torch here.
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment["PATH"] = os.pathsep.join(path)
    return subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path.home(),
        env=environment,
        start_new_session=True,
    )


def _end_of(child: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """The exit code when it comes. A thread of its own waits, which does not keep the server from ending."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def wait() -> None:
        code = child.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends before the command
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, daemon=True).start()
    return ended
