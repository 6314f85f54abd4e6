"""A stream to a node's agent that another node opened, which puts the bytes of chunks into it from its own disk."""

from __future__ import annotations

from typing import Protocol

from orchestrator.errors import UnreachableError
from orchestrator.ssh.transport import ByteStream, CommandResult
from remote_payload.wire.forward import FAR_END_GONE_STATUS
from remote_payload.wire.names import printable

_SHOWN_BYTES = 400
_CONNECTION_LOST = (None, 255)


class ForwardedStreamOwner(Protocol):
    """Who is told what becomes of it."""

    def ended(self) -> None:
        """It was closed; called once."""

    def far_end_was_lost(self, why: str) -> None:
        """The forwarding node lost the other one."""

    def connection_was_lost(self) -> None:
        """We lost the forwarding node."""


class ForwardedStream:
    """A `ByteStream`. Nothing is told of an end that was asked for, by `close` or `close_write`. `may_pack`: the node
    may pack floats, where its own link to the other one is slower than that."""

    def __init__(self, inner: ByteStream, owner: ForwardedStreamOwner, *, may_pack: bool) -> None:
        self.may_pack = may_pack
        self._inner = inner
        self._owner = owner
        self._is_ending = False
        self._is_closed = False

    def write(self, data: bytes | memoryview) -> None:
        try:
            self._inner.write(data)
        except UnreachableError:
            self._note_lost()
            raise

    def close_write(self) -> None:
        self._is_ending = True
        self._inner.close_write()

    def read(self, max_bytes: int) -> bytes:
        try:
            return self._inner.read(max_bytes)
        except UnreachableError:
            self._note_lost()
            raise

    def finish(self, timeout_s: float) -> CommandResult:
        try:
            result = self._inner.finish(timeout_s)
        except UnreachableError:
            self._note_lost()
            raise
        if result.exit_status in _CONNECTION_LOST:
            self._note_lost()
        if not self._is_ending and result.exit_status == FAR_END_GONE_STATUS:
            said = printable(result.stderr[-_SHOWN_BYTES:].decode(errors="replace")).strip()
            self._owner.far_end_was_lost(said.rpartition("\n")[2])
        return result

    def close(self) -> None:
        self._is_ending = True
        self._inner.close()
        if not self._is_closed:
            self._is_closed = True
            self._owner.ended()

    def __enter__(self) -> ForwardedStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _note_lost(self) -> None:
        if not self._is_ending:
            self._owner.connection_was_lost()
