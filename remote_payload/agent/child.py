"""A child process in its own process group, every byte of whose output is taken off its hands."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Callable, Optional

from remote_payload.jobs.context import LIFELINE_FD_VARIABLE, PROGRESS_FD_VARIABLE
from remote_payload.wire.names import printable

_KILL_WAIT_S = 10.0
_DRAIN_LIMIT_S = 2.0
_CAN_WAIT_WITHOUT_REAPING = hasattr(os, "waitid")

Sink = Callable[[bytes], None]


class Child:
    """Starts `command` with its standard output, error and progress pipe each given to a sink.

    The child leads a session and a process group of its own, and holds the reading end of a lifeline: a pipe that ends
    when this process does, however it ends. `pump` must be called often, or the child blocks on its full pipes. Raises
    `OSError` if the command cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: str,
        stdout: Sink,
        stderr: Sink,
        progress: Sink,
        keep_open: Sequence[int] = (),
    ) -> None:
        progress_read, progress_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={
                    **environment,
                    PROGRESS_FD_VARIABLE: str(progress_write),
                    LIFELINE_FD_VARIABLE: str(lifeline_read),
                },
                pass_fds=(progress_write, lifeline_read, *keep_open),
                start_new_session=True,
            )
        except OSError:
            os.close(progress_read)
            os.close(self._lifeline)
            raise
        finally:
            os.close(progress_write)
            os.close(lifeline_read)
        self._selector = selectors.DefaultSelector()
        for descriptor, sink in (
            (_descriptor(self._process.stdout), stdout),
            (_descriptor(self._process.stderr), stderr),
            (progress_read, progress),
        ):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, sink)

    @property
    def pid(self) -> int:
        return self._process.pid

    def pump(self, timeout_s: float) -> None:
        """Hand what the child has written to the sinks, waiting at most `timeout_s` for the first of it."""
        if not self._selector.get_map():
            time.sleep(min(timeout_s, 0.05))
            return
        for key, _ in self._selector.select(timeout_s):
            self._read_once(key)

    def has_ended(self) -> bool:
        """Whether the child itself has ended. Where the system allows, it stays a zombie, and its pid its own, until
        `close`.
        """
        if self._process.returncode is not None:
            return True
        if not _CAN_WAIT_WITHOUT_REAPING:
            if self._process.poll() is None:
                return False
            # Reaped only now: what is left of its group goes before its number can be another's.
            self._kill_group(signal.SIGKILL)
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal_child(self, number: int) -> None:
        if not self.has_ended():
            os.kill(self.pid, number)

    def stop(self, grace_s: float) -> bool:
        """End the process group: SIGTERM, `grace_s` to leave, SIGKILL. False if even that did not end the child."""
        self._signal_group(signal.SIGTERM)
        self._await_end(grace_s)
        self._signal_group(signal.SIGKILL)
        return self._await_end(_KILL_WAIT_S)

    def close(self) -> Optional[int]:
        """Kill what is left of the group, take the last output, and return the exit status as `Popen` has it.

        None: the child could not be ended and is left behind.
        """
        self._signal_group(signal.SIGKILL)
        deadline = time.monotonic() + _DRAIN_LIMIT_S
        while self._selector.get_map() and time.monotonic() < deadline:
            self.pump(0.1)
        for key in list(self._selector.get_map().values()):
            self._drop(key)
        self._selector.close()
        os.close(self._lifeline)
        return self._process.poll()

    def _await_end(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not self.has_ended():
            if time.monotonic() > deadline:
                return False
            self.pump(0.1)
        return True

    def _signal_group(self, number: int) -> None:
        # Once the child has been reaped, its number may be another's.
        if self._process.returncode is None:
            self._kill_group(number)

    def _kill_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _read_once(self, key: selectors.SelectorKey) -> None:
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            key.data(data)
        else:
            self._drop(key)

    def _drop(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fd)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed and stream.fileno() == key.fd:
                stream.close()
                return
        os.close(key.fd)


def describe_exit(returncode: Optional[int]) -> str:
    """An exit status in words."""
    if returncode is None:
        return "it could not be ended, not even by SIGKILL"
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def last_line(text: bytes) -> str:
    """The last line of an error output that says something, made harmless."""
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return printable(lines[-1].strip())[:500] if lines else ""


def _descriptor(stream: object) -> int:
    if not hasattr(stream, "fileno"):
        raise OSError("the child has no pipe")
    return int(stream.fileno())
