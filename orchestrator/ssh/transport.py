"""The seam between us and SSH: what every transport promises, whatever carries it."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a remote script answered. `exit_status` None: it ended by a signal that the server did not name."""

    exit_status: int | None
    stdout: bytes
    stderr: bytes


class ByteStream(Protocol):
    """A running remote script's standard streams, for bulk data. Leaving its context ends the script."""

    def write(self, data: bytes | memoryview) -> None:
        """Send all of `data`. Raises `ConnectionLostError`; `CommandTimeoutError` if nothing moves in the idle time."""

    def close_write(self) -> None:
        """Half-close: the script sees end of file on its standard input."""

    def read(self, max_bytes: int) -> bytes:
        """At least one byte, or `b""` at end of file. Same errors as `write`."""

    def finish(self, timeout_s: float) -> CommandResult:
        """Wait for the end; `stdout` holds what was left unread, `stderr` all that was said there (bounded)."""

    def close(self) -> None: ...

    def __enter__(self) -> ByteStream: ...

    def __exit__(self, *exc_info: object) -> None: ...


@dataclasses.dataclass(frozen=True)
class StreamFacts:
    """How a bulk stream travels. What is None is not known, since ssh or another opened the socket. `round_trip_s`: of
    the path when it was opened."""

    carried_by: str
    congestion_control: str | None = None
    round_trip_s: float | None = None


@runtime_checkable
class BulkStream(ByteStream, Protocol):
    """A `ByteStream` that moves data without copies of our own."""

    @property
    def facts(self) -> StreamFacts: ...

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send some bytes of a file, at most `count`, and return how many; 0 at its end. Errors as `write`, and
        `OSError` where the file cannot be read."""

    def read_into(self, view: memoryview) -> int:
        """As `read`, into the start of `view`: how many bytes, 0 at end of file."""


class Transport(Protocol):
    """One authenticated connection to a node.

    Scripts are POSIX sh, sent on the standard input of `/bin/sh`, so that no login shell parses them. Nothing is
    retried here: a lost connection raises `ConnectionLostError` and the caller knows whether its command may be
    repeated. All methods may be called from several threads.
    """

    @property
    def description(self) -> str:
        """`user@host:port` for messages."""

    @property
    def round_trip_s(self) -> float | None:
        """Of the path to the node; None where it is not known."""

    def run(self, script: str, *, timeout_s: float, max_output_bytes: int = 64 * 1024 * 1024) -> CommandResult:
        """Run `script` with its standard input at end of file after the script itself.

        Raises `CommandTimeoutError`, `ConnectionLostError`. A non-zero exit status is a result, not an exception.
        """

    def open_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """Run `script` and keep its streams.

        A shell may read ahead of its script, so data may be written only after the script has said on stdout that it is
        ready to read.
        """

    def open_bulk_stream(self, script: str, *, idle_timeout_s: float) -> ByteStream:
        """As `open_stream`, over a connection of its own where one can be had without a person, else over this one.

        Returns when the script has said its first byte. Raises `UnreachableError` where the node takes no further
        connection now.
        """

    def is_alive(self) -> bool:
        """Probe the connection with a round trip; False where a later `run` would fail."""

    def close(self) -> None: ...
