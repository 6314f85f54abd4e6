"""One `ssh` process that carries a bulk stream: large pipes, files moved into them by the kernel, bounded waits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from orchestrator.errors import CommandTimeoutError, ConnectionLostError
from orchestrator.ssh.bounded import BoundedBytes
from orchestrator.ssh.scripts import split_mark
from orchestrator.ssh.transport import CommandResult, StreamFacts

PIPE_BYTES = 1024 * 1024
LEFT_OVER_BYTES = 4 * 1024 * 1024
_READ_BYTES = 256 * 1024
_END_GRACE_S = 2.0
_DRAIN_S = 0.0005
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
_CAN_SENDFILE = hasattr(os, "sendfile") and os.uname().sysname == "Linux"
"""Elsewhere `sendfile` serves sockets only."""


class BulkProcess:
    """The process and its pipes. One thread may write while another reads; closing it ends both."""

    def __init__(self, command: Sequence[str], target: str, environment: Mapping[str, str]) -> None:
        """Raises `OSError`."""
        self._target = target
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C must not cut a chunk in two, and helpers of the client end with it
        )
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise OSError("the client has no pipes")
        self._process = process
        self._stdin, self._stdout, self._stderr_pipe = process.stdin, process.stdout, process.stderr
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(OSError):  # beyond the user's share of pipe memory the usual size must do
                fcntl.fcntl(pipe.fileno(), _F_SETPIPE_SZ, PIPE_BYTES)
        self._head = b""
        self._users = threading.Condition()
        self._busy = 0
        self._writers = 0
        self._is_ending = False
        self._is_closed = False
        self._stderr = BoundedBytes(LEFT_OVER_BYTES)
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()

    def write(self, data: bytes | memoryview, idle_timeout_s: float) -> None:
        view = memoryview(data).cast("B")
        with self._writing():
            while view:
                try:
                    view = view[os.write(self._stdin.fileno(), view) :]
                except BlockingIOError:
                    self._await_room(idle_timeout_s)

    def send_file(self, fd: int, offset: int, count: int, idle_timeout_s: float) -> int:
        if not _CAN_SENDFILE:
            data = os.pread(fd, min(count, PIPE_BYTES), offset)
            self.write(data, idle_timeout_s)
            return len(data)
        with self._writing():
            while True:
                try:
                    return os.sendfile(self._stdin.fileno(), fd, offset, count)
                except BlockingIOError:
                    self._await_room(idle_timeout_s)

    def close_write(self) -> None:
        """No more is written; whoever is at it hears that, and then the pipe ends."""
        with self._users:
            self._is_ending = True
            if not self._writers and not self._is_closed:
                self._stdin.close()

    def await_first_byte(self, timeout_s: float) -> bool:
        """Whether something was said before the end of output. Raises `CommandTimeoutError`."""
        self._head = self.read(_READ_BYTES, timeout_s)
        return bool(self._head)

    def read(self, max_bytes: int, idle_timeout_s: float) -> bytes:
        if self._head:
            data, self._head = self._head[:max_bytes], self._head[max_bytes:]
            return data
        with self._using("receiving data"):
            while True:
                try:
                    return os.read(self._stdout.fileno(), max_bytes)
                except BlockingIOError:
                    self._await(self._stdout.fileno(), select.POLLIN, idle_timeout_s)

    def read_into(self, view: memoryview, idle_timeout_s: float) -> int:
        if self._head:
            data = self.read(len(view), idle_timeout_s)
            view[: len(data)] = data
            return len(data)
        with self._using("receiving data"):
            while True:
                try:
                    return os.readv(self._stdout.fileno(), [view])
                except BlockingIOError:
                    self._await(self._stdout.fileno(), select.POLLIN, idle_timeout_s)

    def wait_for_end(self, timeout_s: float) -> tuple[int | None, bytes]:
        """(the client's exit code, or None while it runs on; what was said on standard error)."""
        deadline = time.monotonic() + timeout_s
        try:
            code: int | None = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr_reader.join(max(0.0, deadline - time.monotonic()) if code is None else _END_GRACE_S)
        return code, self._stderr.value()

    def close(self) -> None:
        """End the client and whoever uses its pipes. Never raises."""
        with self._users:
            if self._is_closed:
                return
            self._is_closed = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with self._users:
            # With the client gone the pipes have ended, so nobody stays in them for long.
            self._users.wait_for(lambda: self._busy == 0, _END_GRACE_S)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._using("sending data"):
            with self._users:
                self._writers += 1
            try:
                self._check_not_ending()
                yield
            finally:
                with self._users:
                    self._writers -= 1
                    # Not earlier: another file could have its number by then.
                    if self._is_ending and not self._writers:
                        self._stdin.close()

    def _check_not_ending(self) -> None:
        if self._is_ending:
            raise ConnectionLostError(f"the stream to {self._target} is closed")

    @contextlib.contextmanager
    def _using(self, doing: str) -> Iterator[None]:
        with self._users:
            if self._is_closed:
                raise ConnectionLostError(f"the stream to {self._target} is closed")
            self._busy += 1
        try:
            yield
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionLostError(f"the connection to {self._target} was lost while {doing}") from error
        finally:
            with self._users:
                self._busy -= 1
                self._users.notify_all()

    def _await_room(self, limit_s: float) -> None:
        self._await(self._stdin.fileno(), select.POLLOUT, limit_s)
        # The client takes 16 KiB at a time: wait for more room than that, or every read of its wakes us.
        time.sleep(_DRAIN_S)
        self._check_not_ending()

    def _await(self, fd: int, event: int, limit_s: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, limit_s) * 1000):
            raise CommandTimeoutError(
                f"{self._target} did not answer in time", action="What has arrived is kept; it is gone on with."
            )

    def _read_stderr(self) -> None:
        with self._stderr_pipe as pipe, contextlib.suppress(OSError):
            while part := pipe.read(_READ_BYTES):
                self._stderr.add(part)


class BulkProcessStream:
    """A `BulkStream` on a `BulkProcess`."""

    def __init__(
        self,
        process: BulkProcess,
        nonce: str,
        idle_timeout_s: float,
        facts: StreamFacts,
        on_close: Callable[[], None],
    ) -> None:
        self._process = process
        self._nonce = nonce
        self._idle_timeout_s = idle_timeout_s
        self._facts = facts
        self._on_close: Callable[[], None] | None = on_close

    @property
    def facts(self) -> StreamFacts:
        return self._facts

    def write(self, data: bytes | memoryview) -> None:
        self._process.write(data, self._idle_timeout_s)

    def send_file(self, fd: int, offset: int, count: int) -> int:
        return self._process.send_file(fd, offset, count, self._idle_timeout_s)

    def close_write(self) -> None:
        self._process.close_write()

    def read(self, max_bytes: int) -> bytes:
        data = self._process.read(max_bytes, self._idle_timeout_s)
        if not data:
            self._raise_if_lost()
        return data

    def read_into(self, view: memoryview) -> int:
        count = self._process.read_into(view, self._idle_timeout_s)
        if not count:
            self._raise_if_lost()
        return count

    def finish(self, timeout_s: float) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        rest = BoundedBytes(LEFT_OVER_BYTES)
        self._process.close_write()
        while data := self._process.read(_READ_BYTES, max(0.0, deadline - time.monotonic())):
            rest.add(data)
        code, said = self._process.wait_for_end(max(_END_GRACE_S, deadline - time.monotonic()))
        if code is None:
            raise CommandTimeoutError("the client did not end in time")
        status, stderr = split_mark(self._nonce, code, said)
        if status is None or status < 0:
            raise ConnectionLostError("the connection was lost while a stream was ending")
        return CommandResult(status, rest.value(), stderr)

    def close(self) -> None:
        self._process.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def __enter__(self) -> BulkProcessStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _raise_if_lost(self) -> None:
        """Tell the end of the script's output from the end of the connection."""
        code, said = self._process.wait_for_end(_END_GRACE_S)
        if code is not None and (status := split_mark(self._nonce, code, said)[0]) is not None and status >= 0:
            return
        if code is not None:
            raise ConnectionLostError("the connection was lost while receiving data")
