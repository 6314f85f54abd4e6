"""Byte streams to the real agent on this machine, as a process or in a thread, and links that cut, flip and count."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import CommandTimeoutError, ConnectionLostError
from orchestrator.ssh.transport import ByteStream, CommandResult
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.streams import serve_stream
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.chunks import Chunk, ChunkManifest, file_digest
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import HEADER_BYTES, FrameKind, decode_header

PATIENCE_S = 60.0
Wrap = Callable[[ByteStream], ByteStream]


class PipeStream:
    """A `ByteStream` over two pipes. `end` waits for whoever is at their other ends."""

    def __init__(
        self, input_fd: int, output_fd: int, end: Callable[[float], CommandResult], idle_timeout_s: float
    ) -> None:
        self._to_agent = input_fd
        self._from_agent = output_fd
        self._end = end
        self._idle_timeout_s = idle_timeout_s
        self._is_writable = True
        self._closing, self._wake = os.pipe()
        self._users = threading.Condition()
        self._busy = 0
        self._is_closed = False
        os.set_blocking(input_fd, False)

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            with self._using():
                self._await(self._to_agent, select.POLLOUT)
                try:
                    left = left[os.write(self._to_agent, left) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError as error:
                    raise ConnectionLostError("the pipe broke") from error

    def close_write(self) -> None:
        if self._is_writable:
            self._is_writable = False
            os.close(self._to_agent)

    def read(self, max_bytes: int) -> bytes:
        with self._using():
            self._await(self._from_agent, select.POLLIN)
            return os.read(self._from_agent, max_bytes)

    def finish(self, timeout_s: float) -> CommandResult:
        return self._end(timeout_s)

    def close(self) -> None:
        """Wakes a reader that is in the middle, as a closed channel would, before the descriptors go."""
        with self._users:
            is_first, self._is_closed = not self._is_closed, True
            if is_first:
                os.write(self._wake, b".")
                while self._busy:
                    self._users.wait()
        if not is_first:
            self._end(PATIENCE_S)
            return
        self.close_write()
        for fd in (self._from_agent, self._closing, self._wake):
            os.close(fd)
        self._end(PATIENCE_S)

    def __enter__(self) -> PipeStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _using(self) -> Any:
        with self._users:
            if self._is_closed:
                raise ConnectionLostError("the stream is closed")
            self._busy += 1
        try:
            yield
        finally:
            with self._users:
                self._busy -= 1
                self._users.notify_all()

    def _await(self, fd: int, event: int) -> None:
        poller = select.poll()
        poller.register(fd, event)
        poller.register(self._closing, select.POLLIN)
        ready = dict(poller.poll(self._idle_timeout_s * 1000))
        if self._closing in ready:
            raise ConnectionLostError("the stream is closed")
        if not ready:
            raise CommandTimeoutError("nothing moved")


class LocalOpener:
    """Opens streams to the agent. `wraps` are put around them in turn: the first stream gets the first."""

    def __init__(self, root: Path, wraps: Sequence[Wrap] = ()) -> None:
        self.layout = NodeLayout(str(root))
        self.opened = 0
        self.reconnects = 0
        self._wraps = list(wraps)

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        nonce = secrets.token_hex(16)
        message = {"verb": verb, "nonce": nonce, "protocol": PROTOCOL_VERSION, "params": to_json(request)}
        stream = self._start(message, nonce, idle_timeout_s)
        seen = b""
        while not seen.endswith(f"\n=remote-eval={nonce}=ready=\n".encode()):
            byte = stream.read(1)
            if not byte:
                raise AssertionError(f"the agent ended before it was ready: {stream.finish(PATIENCE_S)}")
            seen += byte
        wrap = self._wraps[self.opened] if self.opened < len(self._wraps) else None
        self.opened += 1
        return wrap(stream) if wrap is not None else stream

    def prepared_stream(self, expected_bytes: int, /) -> ByteStream | None:
        return None

    def reconnect(self) -> None:
        self.reconnects += 1

    def _start(self, message: dict[str, Any], nonce: str, idle_timeout_s: float) -> ByteStream:
        raise NotImplementedError


class ThreadOpener(LocalOpener):
    """The agent in a thread of the test: fast, for properties with many examples."""

    def _start(self, message: dict[str, Any], nonce: str, idle_timeout_s: float) -> ByteStream:
        agent_in, to_agent = os.pipe()
        from_agent, agent_out = os.pipe()
        statuses: list[int] = []

        def serve() -> None:
            try:
                with FdChannel(agent_in, agent_out) as channel:
                    statuses.append(serve_stream(channel, message, nonce))
            finally:
                os.close(agent_out)
                os.close(agent_in)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()

        def end(timeout_s: float) -> CommandResult:
            thread.join(timeout_s)
            assert not thread.is_alive(), "the agent does not end"
            return CommandResult(statuses[0] if statuses else 1, b"", b"")

        return PipeStream(to_agent, from_agent, end, idle_timeout_s)


class ProcessOpener(LocalOpener):
    """The agent as a process, started by `command(request)`."""

    def __init__(
        self,
        root: Path,
        command: Callable[[str], list[str]],
        wraps: Sequence[Wrap] = (),
        before_exec: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(root, wraps)
        self._command = command
        self._before_exec = before_exec
        self.processes: list[subprocess.Popen[bytes]] = []

    def kill(self) -> None:
        self.processes[-1].send_signal(signal.SIGKILL)

    def _start(self, message: dict[str, Any], nonce: str, idle_timeout_s: float) -> ByteStream:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the stream
        process = subprocess.Popen(
            self._command(frames.encode_request(message)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            preexec_fn=self._before_exec,
        )
        self.processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        to_agent, from_agent = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
        process.stdin.close()
        process.stdout.close()

        def end(timeout_s: float) -> CommandResult:
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise CommandTimeoutError("the agent does not end") from error
            errors.seek(0)
            return CommandResult(status if status >= 0 else 128 - status, b"", errors.read())

        return PipeStream(to_agent, from_agent, end, idle_timeout_s)


class _Wrapped:
    """A stream around a stream."""

    def __init__(self, inner: ByteStream) -> None:
        self.inner = inner
        self.written = 0
        self.read_count = 0

    def write(self, data: bytes | memoryview) -> None:
        self.inner.write(data)
        self.written += len(data)

    def close_write(self) -> None:
        self.inner.close_write()

    def read(self, max_bytes: int) -> bytes:
        data = self.inner.read(max_bytes)
        self.read_count += len(data)
        return data

    def finish(self, timeout_s: float) -> CommandResult:
        return self.inner.finish(timeout_s)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class CutStream(_Wrapped):
    """Carries so many bytes each way, and then nothing any more, either way."""

    def __init__(self, inner: ByteStream, write_bytes: int | None, read_bytes: int | None) -> None:
        super().__init__(inner)
        self._write_bytes = write_bytes
        self._read_bytes = read_bytes
        self._is_cut = False

    def write(self, data: bytes | memoryview) -> None:
        self._check()
        if self._write_bytes is not None and self.written + len(data) > self._write_bytes:
            super().write(memoryview(data)[: self._write_bytes - self.written])
            self._cut()
        super().write(data)

    def read(self, max_bytes: int) -> bytes:
        self._check()
        if self._read_bytes is None:
            return super().read(max_bytes)
        if self.read_count >= self._read_bytes:
            self._cut()
        return super().read(min(max_bytes, self._read_bytes - self.read_count))

    def _check(self) -> None:
        if self._is_cut:
            raise ConnectionLostError("the link is cut")

    def _cut(self) -> None:
        self._is_cut = True
        threading.Thread(target=self.inner.close, daemon=True).start()
        raise ConnectionLostError("the link is cut")


class TurnStream(_Wrapped):
    """Counts how often the client speaks after it has listened: each such turn costs a round trip."""

    def __init__(self, inner: ByteStream) -> None:
        super().__init__(inner)
        self.turns = 0
        self._has_listened = True

    def write(self, data: bytes | memoryview) -> None:
        self.turns += self._has_listened
        self._has_listened = False
        super().write(data)

    def read(self, max_bytes: int) -> bytes:
        self._has_listened = True
        return super().read(max_bytes)


class FlipStream(_Wrapped):
    """Flips one bit at the given offset of what is written, or of what is read."""

    def __init__(self, inner: ByteStream, write_at: int | None = None, read_at: int | None = None) -> None:
        super().__init__(inner)
        self._write_at = write_at
        self._read_at = read_at

    def write(self, data: bytes | memoryview) -> None:
        super().write(_flipped(bytes(data), self._write_at, self.written))

    def read(self, max_bytes: int) -> bytes:
        at = self.read_count
        return _flipped(super().read(max_bytes), self._read_at, at)


class WatchedStream(_Wrapped):
    """Calls `when_written` once, after so many bytes."""

    def __init__(self, inner: ByteStream, write_bytes: int, when_written: Callable[[], None]) -> None:
        super().__init__(inner)
        self._left = write_bytes
        self._when_written: Callable[[], None] | None = when_written

    def write(self, data: bytes | memoryview) -> None:
        super().write(data)
        self._left -= len(data)
        if self._left <= 0 and self._when_written is not None:
            call, self._when_written = self._when_written, None
            call()


class ChunkLedger:
    """Which chunks went over the streams that it was put around and which were acknowledged, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def around(self, inner: ByteStream) -> ByteStream:
        return _LedgerStream(inner, self.events)

    @property
    def sent(self) -> list[int]:
        return [index for event, index in self.events if event == "sent"]

    @property
    def acknowledged(self) -> set[int]:
        return {index for event, index in self.events if event == "acknowledged"}

    @property
    def sent_after_acknowledged(self) -> list[int]:
        known: set[int] = set()
        wrong = []
        for event, index in self.events:
            if event == "acknowledged":
                known.add(index)
            elif index in known:
                wrong.append(index)
        return wrong


class _LedgerStream(_Wrapped):
    """The client writes a chunk's header by itself, and reads frames as they come."""

    def __init__(self, inner: ByteStream, events: list[tuple[str, int]]) -> None:
        super().__init__(inner)
        self._events = events
        self._unread = b""

    def write(self, data: bytes | memoryview) -> None:
        if len(data) == HEADER_BYTES and bytes(data[:2]) == b"RE":
            header = decode_header(bytes(data))
            if header.kind is FrameKind.DATA:
                self._events.append(("sent", header.argument))
        super().write(data)

    def read(self, max_bytes: int) -> bytes:
        data = super().read(max_bytes)
        self._unread += data
        while len(self._unread) >= HEADER_BYTES:
            header = decode_header(self._unread[:HEADER_BYTES])
            end = HEADER_BYTES + header.length + 4
            if len(self._unread) < end:
                break
            self._unread = self._unread[end:]
            if header.kind is FrameKind.ACK:
                self._events.append(("acknowledged", header.argument))
        return data


def journalled(root: Path, manifest: ChunkManifest) -> set[int]:
    """The chunks that the node's journal says are there."""
    path = Path(NodeLayout(str(root)).checkpoint_journal(manifest.digest))
    text = path.read_bytes() if path.exists() else b""
    return {int(line.split()[0]) for line in text.split(b"\n")[1:] if line.endswith(b".")}


def manifest_of(content: bytes, cuts: Sequence[int]) -> ChunkManifest:
    """A manifest with chunk borders at `cuts`, so that small files have many chunks."""
    borders = sorted({0, len(content), *(cut for cut in cuts if 0 < cut < len(content))})
    chunks = tuple(
        Chunk(start, end - start, hashlib.sha256(content[start:end]).hexdigest())
        for start, end in itertools.pairwise(borders)
    )
    return ChunkManifest(file_digest(chunks), len(content), chunks)


def even_cuts(size: int, chunk_bytes: int) -> list[int]:
    return list(range(chunk_bytes, size, chunk_bytes))


def make_node_root(base: Path) -> Path:
    """An empty node root with its marker."""
    root = base / "node root"
    root.mkdir(mode=0o700)
    Path(NodeLayout(str(root)).marker).touch(mode=0o600)
    return root


def check_stored(root: Path, manifest: ChunkManifest, content: bytes) -> None:
    """The file and its manifest stand in the store, and nothing half done beside them."""
    layout = NodeLayout(str(root))
    assert Path(layout.checkpoint(manifest.digest)).read_bytes() == content
    written = json.loads(Path(layout.checkpoint_manifest(manifest.digest)).read_text())
    assert from_json(ChunkManifest, written) == manifest
    assert sorted(path.name for path in Path(layout.checkpoint_folder(manifest.digest)).iterdir()) == [
        "chunks.json",
        "file",
        "lock",
        "uses",
        "verified.json",
    ]


def check_not_stored(root: Path, manifest: ChunkManifest) -> None:
    assert not Path(NodeLayout(str(root)).checkpoint(manifest.digest)).exists()


def _flipped(data: bytes, at: int | None, start: int) -> bytes:
    if at is None or not start <= at < start + len(data):
        return data
    changed = bytearray(data)
    changed[at - start] ^= 0x10
    return bytes(changed)
