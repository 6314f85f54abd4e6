"""A transport over the system's `ssh`: one ControlMaster, and one client process for each command."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.errors import CommandTimeoutError, ConnectionLostError, InternalError
from orchestrator.ssh.bounded import BoundedBytes
from orchestrator.ssh.bulk import BulkLogins, open_or_ride
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.foreign_errors import mapped
from orchestrator.ssh.openssh_master import Master, start_master
from orchestrator.ssh.scripts import marked_command, script_bytes, split_mark, stream_script_bytes
from orchestrator.ssh.settings import ConnectionSettings, Prompt
from orchestrator.ssh.transport import ByteStream, CommandResult

PROBE_TIMEOUT_S = 10.0
MAX_SESSIONS = 8
STREAM_LEFT_OVER_BYTES = 4 * 1024 * 1024
_READ_BYTES = 256 * 1024
_END_GRACE_S = 2.0
_MAX_LOG_BYTES = 64 * 1024


def connect_openssh(
    settings: ConnectionSettings, effective: EffectiveConfig, prompt: Prompt, sockets_folder: Path
) -> OpenSSHTransport:
    """Log in with the system's `ssh`. One try; raises the diagnosed error."""
    master = start_master(settings, effective, prompt, sockets_folder)
    return OpenSSHTransport(master, effective.description, BulkLogins(settings, effective, sockets_folder))


class OpenSSHTransport:
    """A `Transport` on a `Master`, which is ended with it."""

    def __init__(self, master: Master, description: str, bulk: BulkLogins) -> None:
        self._master = master
        self._bulk = bulk
        self._description = description
        self._sessions = threading.BoundedSemaphore(MAX_SESSIONS)
        self._closed = threading.Event()

    @property
    def description(self) -> str:
        return self._description

    @property
    def round_trip_s(self) -> float | None:
        return None

    def run(self, script: str, *, timeout_s: float, max_output_bytes: int = 64 * 1024 * 1024) -> CommandResult:
        """As `Transport.run`. Of each stream the first `max_output_bytes` are kept; the rest is read and dropped."""
        deadline = time.monotonic() + timeout_s
        with self._session(deadline) as session, mapped(self._description, "running a command"):
            stdout = BoundedBytes(max_output_bytes)
            session.start(max_output_bytes)
            session.exchange(script_bytes(script), stdout, deadline)
            return self._result(session, stdout, deadline)

    def open_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """As `Transport.open_stream`. Closing it closes the streams: the script ends by end of file or SIGPIPE."""
        stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.callback(stack.close)
            session = stack.enter_context(self._session(time.monotonic() + idle_timeout_s))
            with mapped(self._description, "opening a stream"):
                session.start(STREAM_LEFT_OVER_BYTES)
                session.write(stream_script_bytes(script), idle_timeout_s)
            stream = OpenSSHStream(self, session, stack, idle_timeout_s)
            opening.pop_all()
        return stream

    def open_bulk_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """As `Transport.open_bulk_stream`."""
        return open_or_ride(self._bulk, self, script, idle_timeout_s)

    def is_alive(self) -> bool:
        """As `Transport.is_alive`: a session is opened on the master's connection and ends at once."""
        if self._closed.is_set():
            return False
        # Beside the counted sessions, of which two fewer are used than servers allow.
        with contextlib.closing(_Session(self._master, self._description)) as session:
            try:
                session.start(_MAX_LOG_BYTES, command="exit 0")
                session.exchange(b"", BoundedBytes(_MAX_LOG_BYTES), time.monotonic() + PROBE_TIMEOUT_S)
                return session.wait(time.monotonic() + PROBE_TIMEOUT_S) == 0
            except (OSError, CommandTimeoutError):
                return False

    def close(self) -> None:
        """End the master and with it every session. Never raises."""
        if not self._closed.is_set():
            self._closed.set()
            self._bulk.close()
            self._master.close()

    @contextlib.contextmanager
    def _session(self, deadline: float) -> Iterator[_Session]:
        if self._closed.is_set():
            raise ConnectionLostError(f"the connection to {self._description} is closed")
        if not self._sessions.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise CommandTimeoutError(f"{self._description}: all {MAX_SESSIONS} sessions were busy")
        try:
            with contextlib.closing(_Session(self._master, self._description)) as session:
                yield session
        finally:
            self._sessions.release()

    def _result(self, session: _Session, stdout: BoundedBytes, deadline: float) -> CommandResult:
        code = session.wait(deadline)
        status, stderr = split_mark(session.nonce, code, session.stderr(deadline))
        if status is None or status < 0:
            # The client failed, or the script's shells died by a signal, which ssh reports with the same number.
            words = session.log()
            if code < 0 or words or not self.is_alive():
                raise ConnectionLostError(
                    f"the connection to {self._description} was lost while running a command",
                    action="What became of the command is not known; its state is read again after reconnecting.",
                    details=words,
                )
            status = None
        return CommandResult(status, stdout.value(), stderr)


class OpenSSHStream:
    """A `ByteStream` on one client process."""

    def __init__(
        self, owner: OpenSSHTransport, session: _Session, stack: contextlib.ExitStack, idle_timeout_s: float
    ) -> None:
        self._owner = owner
        self._session = session
        self._stack = stack
        self._idle_timeout_s = idle_timeout_s

    def write(self, data: bytes | memoryview) -> None:
        with mapped(self._owner.description, "sending data"):
            self._session.write(data, self._idle_timeout_s)

    def close_write(self) -> None:
        with mapped(self._owner.description, "sending data"):
            self._session.close_stdin()

    def read(self, max_bytes: int) -> bytes:
        with mapped(self._owner.description, "receiving data"):
            data = self._session.read(max_bytes, self._idle_timeout_s)
            if not data and self._session.failed_within(_END_GRACE_S):
                words = self._session.log()
                if words or not self._owner.is_alive():
                    raise EOFError(words)
        return data

    def finish(self, timeout_s: float) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        rest = BoundedBytes(STREAM_LEFT_OVER_BYTES)
        with mapped(self._owner.description, "ending a stream"):
            self._session.exchange(b"", rest, deadline)
            return self._owner._result(self._session, rest, deadline)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> OpenSSHStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Session:
    """One `ssh` process on the master. Pipes are non-blocking on our side; every wait has a limit."""

    def __init__(self, master: Master, target: str) -> None:
        self._master = master
        self._target = target
        self.nonce = secrets.token_hex(8)
        self._log = master.folder / f"{self.nonce}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = BoundedBytes(0)
        self._stderr_reader: threading.Thread | None = None

    def start(self, max_stderr_bytes: int, command: str | None = None) -> None:
        """Start the client. Raises `OSError`."""
        self._stderr = BoundedBytes(max_stderr_bytes)
        self._process = subprocess.Popen(
            [*self._master.command_prefix(self._log), command or marked_command(self.nonce)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C detaches the user from the run; it must not cut a command in two
        )
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()

    def exchange(self, data: bytes, stdout: BoundedBytes, deadline: float) -> None:
        """Send `data`, half-close, and read standard output to its end. A script that stops reading is no trouble."""
        view = memoryview(data)
        if not view:
            self.close_stdin()
        while True:
            writers = [] if self._stdin.closed else [self._stdin.fileno()]
            readable, writable = self._wait_for([self._stdout.fileno()], writers, deadline - time.monotonic())
            if writable:
                view = self._write_some(view)
                if not view:
                    self.close_stdin()
            if readable:
                part = self._stdout.read(_READ_BYTES)
                if part == b"":
                    return
                if part is not None:
                    stdout.add(part)

    def write(self, data: bytes | memoryview, idle_timeout_s: float) -> None:
        """Send all of `data`. Raises `OSError`, `CommandTimeoutError`."""
        view = memoryview(data).cast("B")
        while view:
            self._wait_for([], [self._stdin.fileno()], idle_timeout_s)
            written = self._stdin.write(view)
            view = view[written or 0 :]

    def read(self, max_bytes: int, idle_timeout_s: float) -> bytes:
        while True:
            self._wait_for([self._stdout.fileno()], [], idle_timeout_s)
            part = self._stdout.read(max_bytes)
            if part is not None:
                return part

    def close_stdin(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def wait(self, deadline: float) -> int:
        """The client's exit code (negative: killed by a signal). Raises `CommandTimeoutError`."""
        try:
            return self._running.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self._too_late() from None

    def failed_within(self, seconds: float) -> bool:
        """Whether the client, whose output has ended, ends with its own failure within `seconds`."""
        try:
            code = self._running.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return split_mark(self.nonce, code, self.stderr(time.monotonic() + seconds))[0] in (None, *range(-64, 0))

    def stderr(self, deadline: float) -> bytes:
        if self._stderr_reader is not None:
            self._stderr_reader.join(max(0.0, deadline - time.monotonic()))
        return self._stderr.value()

    def log(self) -> str:
        """What the client itself had to say."""
        try:
            return self._log.read_bytes()[-_MAX_LOG_BYTES:].decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def close(self) -> None:
        """End the client, whatever it is doing."""
        process = self._process
        if process is None:
            return
        # First, since a master whose client died tells the server of the end of file only when it next has to say
        # something, which on a quiet connection is the next keepalive.
        with contextlib.suppress(OSError):
            self._stdin.close()
        # A client of a master holds off SIGTERM until its session ends.
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            self._stdout.close()
        self._log.unlink(missing_ok=True)

    def _write_some(self, view: memoryview) -> memoryview:
        try:
            return view[self._stdin.write(view[:_READ_BYTES]) or 0 :]
        except BrokenPipeError:
            return view[:0]

    def _wait_for(self, readers: list[int], writers: list[int], limit_s: float) -> tuple[bool, bool]:
        poll = select.poll()
        for fd in readers:
            poll.register(fd, select.POLLIN)
        for fd in writers:
            poll.register(fd, select.POLLOUT)
        events = poll.poll(max(0.0, limit_s) * 1000)
        if not events:
            raise self._too_late()
        ready = {fd for fd, _ in events}
        return bool(ready & set(readers)), bool(ready & set(writers))

    def _read_stderr(self) -> None:
        # This thread alone closes the pipe. The master holds its other end too, even after the client was killed.
        with _there(self._running.stderr) as pipe, contextlib.suppress(OSError):
            while part := pipe.read(_READ_BYTES):
                self._stderr.add(part)

    def _too_late(self) -> CommandTimeoutError:
        return CommandTimeoutError(
            f"{self._target} did not answer in time", action="The node may be overloaded; its state is read again."
        )

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise InternalError("the session was not started")
        return self._process

    @property
    def _stdin(self) -> IO[bytes]:
        return _there(self._running.stdin)

    @property
    def _stdout(self) -> IO[bytes]:
        return _there(self._running.stdout)


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise InternalError("the session has no pipes")
    return pipe
