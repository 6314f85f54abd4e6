"""The control plane over one Fabric connection.

Fabric's defaults (AutoAdd, no timeouts, the user's standard input read along) are all replaced; what is kept is one
`Connection` per hop and its life cycle. Scripts run on session channels of the connection's transport.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import CommandTimeoutError, ConnectionLostError, InternalError, UnreachableError
from orchestrator.ssh import dial
from orchestrator.ssh.bounded import BoundedBytes
from orchestrator.ssh.bulk import BulkLogins, open_or_ride
from orchestrator.ssh.foreign_errors import mapped
from orchestrator.ssh.scripts import REMOTE_COMMAND, script_bytes, stream_script_bytes
from orchestrator.ssh.transport import ByteStream, CommandResult

if TYPE_CHECKING:
    import paramiko

PROBE_TIMEOUT_S = 10.0
MAX_SESSIONS = 8
"""sshd allows 10 sessions on a connection (MaxSessions) and refuses the next; two are left for probes."""
_REFUSAL_PATIENCE_S = 3.0
_REFUSAL_PAUSE_S = 0.05

STREAM_LEFT_OVER_BYTES = 4 * 1024 * 1024
_READ_BYTES = 256 * 1024
_JOIN_S = 2.0


class FabricTransport:
    """A `Transport` over an opened Fabric connection. `gateways` are the jump hosts' connections, first hop first; all
    are closed with it."""

    def __init__(
        self,
        connection: Any,
        gateways: Sequence[Any],
        description: str,
        channel_timeout_s: float,
        bulk: BulkLogins,
    ) -> None:
        self._connection = connection
        self._bulk = bulk
        self._gateways = tuple(gateways)
        self._description = description
        self._channel_timeout_s = channel_timeout_s
        self._sessions = threading.BoundedSemaphore(MAX_SESSIONS)
        self._closed = threading.Event()

    @property
    def description(self) -> str:
        return self._description

    @property
    def round_trip_s(self) -> float | None:
        """Behind a jump host there is no socket of ours that would know it."""
        connection = self._connection.transport
        return None if connection is None or self._gateways else dial.least_round_trip_s(connection.sock)

    def run(self, script: str, *, timeout_s: float, max_output_bytes: int = 64 * 1024 * 1024) -> CommandResult:
        """As `Transport.run`. Of each stream the first `max_output_bytes` are kept; the rest is read and dropped."""
        deadline = time.monotonic() + timeout_s
        stdout, stderr = BoundedBytes(max_output_bytes), BoundedBytes(max_output_bytes)
        with self._session(deadline, "running a command") as (channel, expiry):
            with expiry, mapped(self._description, "running a command"):
                helpers = [
                    _start(_write_all, channel, script_bytes(script)),
                    _start(_drain, channel.recv_stderr, stderr),
                ]
                _drain(channel.recv, stdout)
                for helper in helpers:
                    # Bounded for a writer that hangs in the socket itself, where closing the channel does not reach.
                    helper.join(max(0.0, deadline - time.monotonic()) + _JOIN_S)
                channel.status_event.wait()
                expiry.check()
            return CommandResult(self._exit_status(channel), stdout.value(), stderr.value())

    def open_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """As `Transport.open_stream`. Closing it closes the streams: the script ends by end of file or SIGPIPE."""
        stack = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.callback(stack.close)
            deadline = time.monotonic() + idle_timeout_s
            channel, expiry = stack.enter_context(self._session(deadline, "opening a stream"))
            with expiry, mapped(self._description, "opening a stream"):
                channel.sendall(stream_script_bytes(script))
                expiry.check()
            stream = FabricStream(self, channel, stack, idle_timeout_s)
            opening.pop_all()
        return stream

    def open_bulk_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """As `Transport.open_bulk_stream`."""
        return open_or_ride(self._bulk, self, script, idle_timeout_s)

    def is_alive(self) -> bool:
        """As `Transport.is_alive`: a channel is opened and closed."""
        import paramiko

        transport = self._connection.transport
        if self._closed.is_set() or transport is None or not transport.is_active():
            return False
        try:
            transport.open_session(timeout=PROBE_TIMEOUT_S).close()
        except (paramiko.SSHException, EOFError, OSError):
            return False
        return True

    def close(self) -> None:
        """End the connection and those of its jump hosts. Never raises."""
        self._closed.set()
        self._bulk.close()
        for connection in (self._connection, *reversed(self._gateways)):
            # Fabric's own close does nothing for a connection that it takes for dead, and leaves its thread behind.
            with contextlib.suppress(OSError, EOFError):
                connection.client.close()

    @contextlib.contextmanager
    def _session(self, deadline: float, doing: str) -> Iterator[tuple[paramiko.Channel, _Expiry]]:
        """A session channel running `/bin/sh`, and the clock that closes it at `deadline`."""
        if not self._sessions.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise CommandTimeoutError(f"{self._description}: all {MAX_SESSIONS} sessions were busy while {doing}")
        try:
            channel = self._open_channel(deadline, doing)
            try:
                expiry = _Expiry(channel, deadline, self._description, doing)
                with expiry, mapped(self._description, doing):
                    try:
                        channel.exec_command(REMOTE_COMMAND)
                    finally:
                        expiry.check()
                yield channel, expiry
            finally:
                with contextlib.suppress(OSError, EOFError):
                    channel.close()
        finally:
            self._sessions.release()

    def _open_channel(self, deadline: float, doing: str) -> paramiko.Channel:
        import paramiko

        transport = self._connection.transport
        if self._closed.is_set() or transport is None or not transport.is_active():
            raise ConnectionLostError(f"the connection to {self._description} is closed", details=f"while {doing}")
        limit_s = min(self._channel_timeout_s, max(0.0, deadline - time.monotonic()))
        began = time.monotonic()
        with mapped(self._description, doing):
            while True:
                left_s = max(_REFUSAL_PAUSE_S, limit_s - (time.monotonic() - began))
                try:
                    return transport.open_session(timeout=left_s)  # type: ignore[no-any-return]
                except paramiko.SSHException as error:
                    waited_s = time.monotonic() - began
                    if not transport.is_active():
                        raise
                    # A busy server counts a session that has ended for a moment longer than we do. Of several threads
                    # paramiko tells only one that it was a refusal.
                    if waited_s < min(_REFUSAL_PATIENCE_S, limit_s):
                        time.sleep(_REFUSAL_PAUSE_S)
                    elif waited_s < limit_s or isinstance(error, paramiko.ChannelException):
                        raise UnreachableError(
                            f"{self._description} refuses another session on the connection",
                            action="Its MaxSessions may be 1, or it is out of processes; ask its administrator.",
                            details=str(error),
                        ) from error
                    else:
                        raise CommandTimeoutError(
                            f"{self._description} did not open a session within {limit_s:.0f} s",
                            details=f"while {doing}",
                        ) from error

    def _exit_status(self, channel: paramiko.Channel) -> int | None:
        """The status that the server told. Without one the channel may have closed because the connection did: paramiko
        closes channels before it calls the connection dead, so only a round trip tells the two apart."""
        if channel.exit_status >= 0:
            return channel.exit_status
        if not self.is_alive():
            raise ConnectionLostError(
                f"the connection to {self._description} was lost while running a command",
                action="What became of the command is not known; its state is read again after reconnecting.",
            )
        return None


class FabricStream:
    """A `ByteStream` on a session channel."""

    def __init__(
        self, owner: FabricTransport, channel: paramiko.Channel, stack: contextlib.ExitStack, idle_timeout_s: float
    ) -> None:
        self._owner = owner
        self._channel = channel
        self._stack = stack
        self._stderr = BoundedBytes(STREAM_LEFT_OVER_BYTES)
        self._stderr_reader = _start(_drain, channel.recv_stderr, self._stderr)
        channel.settimeout(idle_timeout_s)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        with mapped(self._owner.description, "sending data"):
            while view:
                sent = self._channel.send(bytes(view[: self._channel.out_max_packet_size or _READ_BYTES]))
                if sent == 0:
                    raise EOFError("the stream is closed")
                view = view[sent:]

    def close_write(self) -> None:
        with mapped(self._owner.description, "sending data"):
            self._channel.shutdown_write()

    def read(self, max_bytes: int) -> bytes:
        with mapped(self._owner.description, "receiving data"):
            data = self._channel.recv(max_bytes)
        if not data:
            self._raise_if_lost()
        return data

    def finish(self, timeout_s: float) -> CommandResult:
        rest = BoundedBytes(STREAM_LEFT_OVER_BYTES)
        deadline = time.monotonic() + timeout_s
        expiry = _Expiry(self._channel, deadline, self._owner.description, "ending a stream")
        with expiry, mapped(self._owner.description, "ending a stream"):
            self._channel.settimeout(None)
            if not self._channel.eof_sent:
                self._channel.shutdown_write()
            _drain(self._channel.recv, rest)
            self._stderr_reader.join(max(0.0, deadline - time.monotonic()) + _JOIN_S)
            self._channel.status_event.wait()
            expiry.check()
        return CommandResult(self._owner._exit_status(self._channel), rest.value(), self._stderr.value())

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> FabricStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _raise_if_lost(self) -> None:
        if self._channel.eof_received or self._channel.exit_status >= 0:
            return
        if not self._owner.is_alive():
            raise ConnectionLostError(f"the connection to {self._owner.description} was lost while receiving data")


class _Expiry:
    """Closes a channel at a deadline, which ends every wait on it: paramiko's own waits for the answer to `exec` and
    for the exit status know no timeout."""

    def __init__(self, channel: paramiko.Channel, deadline: float, target: str, doing: str) -> None:
        self._channel = channel
        self._deadline = deadline
        self._message = f"{target} did not answer in time while {doing}"
        self._timer: threading.Timer | None = None
        self.passed = False

    def __enter__(self) -> _Expiry:
        self._timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), self._expire)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._timer is None:
            raise InternalError("the deadline was never started")
        self._timer.cancel()

    def check(self) -> None:
        """Raise `CommandTimeoutError` if the deadline ended the channel."""
        if self.passed:
            raise CommandTimeoutError(self._message, action="The node may be overloaded; its state is read again.")

    def _expire(self) -> None:
        self.passed = True
        with contextlib.suppress(OSError, EOFError):
            self._channel.close()


def _start(target: Any, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _write_all(channel: paramiko.Channel, data: bytes) -> None:
    # The script may end without reading all of itself, which is no error.
    with contextlib.suppress(OSError, EOFError):
        channel.sendall(data)
        channel.shutdown_write()


def _drain(receive: Any, into: BoundedBytes) -> None:
    while True:
        try:
            data = receive(_READ_BYTES)
        except TimeoutError:
            continue  # a stream's idle time; silence on standard error is no trouble, and a closed channel says so
        except (OSError, EOFError):
            return
        if not data:
            return
        into.add(data)
