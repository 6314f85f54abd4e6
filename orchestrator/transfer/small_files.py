"""Fetching many small files of a folder over one stream: wants run ahead of the answers, so none costs a round trip."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.fsutil import write_atomically
from orchestrator.transfer.channel import (
    IDLE_TIMEOUT_S,
    FrameChannel,
    ReconnectPolicy,
    StreamDamagedError,
    StreamOpener,
    with_reconnects,
)
from orchestrator.transfer.fetch import FetchResult
from orchestrator.transfer.progress import ProgressListener, ProgressMeter, TokenBucket
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.names import printable
from remote_payload.wire.stream import FrameKind, SendRequest, SpanEnd, SpanFacts, Want

SMALL_BYTES = 1024 * 1024
"""A file of fewer bytes than this is small: it is held in memory until it is whole."""
_WANTS_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: absolute `path` on the node, as it was `listed`, to `target` here, whose folder exists."""

    path: str
    listed: ListedFile
    target: Path


def fetch_small_files(
    opener: StreamOpener,
    files: Sequence[RemoteFile],
    *,
    overwrite: bool = False,
    bandwidth_limit_bytes_per_s: float | None = None,
    on_progress: ProgressListener | None = None,
    retry: ReconnectPolicy | None = None,
) -> list[FetchResult]:
    """Bring them here, each in its place at once when it is whole. What is here already is compared by digest.

    Raises as `fetch_file`. What arrived before is kept.
    """
    for file in files:
        _refuse_another(file, overwrite)
    work = _Work(opener, files, overwrite, TokenBucket(bandwidth_limit_bytes_per_s), on_progress)
    with_reconnects(opener, work.attempt, lambda: work.done_bytes, retry or ReconnectPolicy())
    return [work.results[file.target] for file in files]


class _Work:
    """The files of one call, through as many streams as it takes."""

    def __init__(
        self,
        opener: StreamOpener,
        files: Sequence[RemoteFile],
        overwrite: bool,
        bucket: TokenBucket,
        on_progress: ProgressListener | None,
    ) -> None:
        self.results: dict[Path, FetchResult] = {}
        self.done_bytes = 0
        self._opener = opener
        self._files = files
        self._overwrite = overwrite
        self._bucket = bucket
        self._on_progress = on_progress
        self._meter = ProgressMeter(sum(file.listed.size for file in files))
        self._saved = 0

    def attempt(self) -> None:
        """Fetch what is missing over one new stream."""
        todo = collections.deque((file, _is_like(file)) for file in self._files if file.target not in self.results)
        left = sum(file.listed.size for file, is_here in todo if not is_here)
        due: collections.deque[tuple[RemoteFile, bool]] = collections.deque()
        stream = self._opener.open_agent_stream(
            "send", SendRequest(self._opener.layout.root, IDLE_TIMEOUT_S), expected_bytes=left
        )
        with stream:
            channel = FrameChannel(stream)
            while todo or due:
                while todo and len(due) < _WANTS_AHEAD:
                    file, is_here = todo.popleft()
                    channel.send_json(FrameKind.WANT, Want(file.path, 0, file.listed.size, digest_only=is_here))
                    due.append((file, is_here))
                file, is_here = due.popleft()
                if not self._take_in(channel, file, is_here):
                    todo.append((file, False))

    def _take_in(self, channel: FrameChannel, file: RemoteFile, digest_only: bool) -> bool:
        """Take in the answer to one want. False where what is here is another file, which is to be overwritten."""
        began = time.monotonic()
        facts = channel.decode(SpanFacts, channel.receive(FrameKind.SPAN)[1])
        listed, size = file.listed, file.listed.size
        if (facts.size, facts.mtime_ns, facts.inode) != (size, listed.mtime_ns, listed.inode):
            raise IntegrityError(
                f"{printable(file.path)} changed while it was fetched", action="Fetch it again when it is complete."
            )
        data = memoryview(bytearray(0 if digest_only else size))
        taken = 0
        while taken < len(data):
            header, _ = channel.receive(FrameKind.DATA)
            if header.argument != taken or not 0 < header.length <= size - taken:
                raise StreamDamagedError("data that was not asked for arrived")
            self._bucket.take(header.length)
            channel.read_data(data[taken : taken + header.length])
            taken += header.length
        sha256 = channel.decode(SpanEnd, channel.receive(FrameKind.END)[1]).sha256
        if digest_only:
            if hashlib.sha256(_read(file.target)).hexdigest() == sha256:
                self._finish(file, FetchResult(file.target, "unchanged", size, 0, size, time.monotonic() - began))
                return True
            if not self._overwrite:
                raise _another(file)
            return False
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StreamDamagedError("a file arrived damaged")
        _put(file, bytes(data))
        self._finish(file, FetchResult(file.target, "fetched", size, size, 0, time.monotonic() - began))
        return True

    def _finish(self, file: RemoteFile, result: FetchResult) -> None:
        self.results[file.target] = result
        self.done_bytes += result.bytes_total
        self._saved += result.bytes_saved
        if self._on_progress is not None:
            self._on_progress(self._meter.measure(self.done_bytes - self._saved, self._saved))


def _refuse_another(file: RemoteFile, overwrite: bool) -> None:
    target = file.target
    if target.is_dir() and not target.is_symlink():
        raise UsageError(f"{target} is a folder", action="Name another place.")
    if (target.is_symlink() or target.exists()) and not _is_like(file) and not overwrite:
        raise _another(file)


def _is_like(file: RemoteFile) -> bool:
    """Whether a regular file of that size is here."""
    target = file.target
    return not target.is_symlink() and target.is_file() and target.stat().st_size == file.listed.size


def _another(file: RemoteFile) -> UsageError:
    return UsageError(f"another file is at {file.target}", action="Name another place, or overwrite it with --force.")


def _read(target: Path) -> bytes:
    try:
        return target.read_bytes()
    except OSError as error:
        raise UsageError(f"{target} cannot be read: {error.strerror}") from error


def _put(file: RemoteFile, data: bytes) -> None:
    try:
        write_atomically(file.target, data)
        os.utime(file.target, ns=(file.listed.mtime_ns, file.listed.mtime_ns))
    except OSError as error:
        raise UsageError(
            f"cannot write {file.target}: {error.strerror or error}",
            action="Free space there or choose another folder, then run this again: what has arrived is kept.",
        ) from error
