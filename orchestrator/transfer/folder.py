"""Sending a checkpoint that is a folder: its large files one after the other, its small ones as one, each by content.

What stands in the node's store afterwards is one folder, complete and verified; its digest follows from the paths and
digests of all files. A file that the store has is not sent, wherever it came from.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from orchestrator.errors import IntegrityError
from orchestrator.node import Node
from orchestrator.transfer.carrier import Carrier, note_of
from orchestrator.transfer.channel import FrameChannel
from orchestrator.transfer.progress import ProgressListener, TransferProgress
from orchestrator.transfer.source import LocalFileChangedError, Source
from orchestrator.transfer.upload import UploadResult
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.members import Member, folder_digest, joined
from remote_payload.wire.messages import PREFIX_BYTES, Assembled, AssembleRequest

ASSEMBLE_TIMEOUT_S = 900.0
"""The node writes small files anew, and copies large ones where its file system has no hard links."""


@dataclasses.dataclass(frozen=True)
class FolderFile:
    """One file of a folder and its chunks."""

    member: Member
    manifest: ChunkManifest


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder as it was read. Files are in the order of their paths."""

    files: tuple[FolderFile, ...]

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        return tuple(file.member for file in self.files)

    @functools.cached_property
    def digest(self) -> str:
        return folder_digest(self.members)

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members)


class Upload(Protocol):
    """Has a folder's carrier put a file of it, or some that stand one behind the other, into the node's store."""

    def __call__(
        self, files: Sequence[FolderFile], manifest: ChunkManifest, on_progress: ProgressListener
    ) -> UploadResult: ...


@dataclasses.dataclass(frozen=True)
class SentFolder:
    """Where the folder stands, how many bytes were sent for it, and what became of a stored copy that the node did not
    believe, in words."""

    path: str
    bytes_sent: int
    note: str = ""


def send_folder(
    node: Node,
    folder: Folder,
    carrier: Carrier,
    upload: Upload,
    progress: FolderProgress,
    *,
    run_id: str = "",
) -> SentFolder:
    """Have the folder complete in the node's store. Nothing is sent where it is; what lacks is given to `upload`, whose
    streams come up once for all files.

    Raises what that and `Node.call` raise. What has arrived is kept.
    """
    packed = [file for file in folder.files if file.member.is_packed]
    pack = joined(file.manifest for file in packed)
    request = AssembleRequest(node.layout.root, folder.members, pack.digest, run_id)
    answer = _assemble(node, request)
    note = note_of(answer)
    large = {file.member.digest: [file] for file in folder.files if not file.member.is_packed}
    missing = sum(large[digest][0].member.size if digest in large else pack.size for digest in answer.missing)
    carrier.expect(missing)
    progress.begin(folder.size - missing)
    sent = 0
    for digest in answer.missing:
        files = large.get(digest, packed)
        manifest = pack if digest == pack.digest else files[0].manifest
        result = upload(files, manifest, progress.of_file)
        sent += result.bytes_sent
        note = note or result.note
        progress.ended()
    if answer.path is None:
        answer = _assemble(node, request)
    if answer.path != node.layout.checkpoint_tree(folder.digest):
        raise IntegrityError(
            f"the node has no complete folder although all {len(folder.files)} files were sent",
            action="Run it again; what has arrived is kept.",
        )
    return SentFolder(answer.path, sent, note)


def send_hashed(files: Iterable[FolderFile], known: frozenset[bytes], upload: Upload, progress: FolderProgress) -> int:
    """Give those large files of a folder to `upload` of which the node lacks something, as far as the beginnings of
    digests tell that it has; how many bytes were sent. For files that come while others are still being hashed:
    `send_folder` sees to the rest."""
    sent = 0
    for file in files:
        if all(bytes.fromhex(chunk.sha256)[:PREFIX_BYTES] in known for chunk in file.manifest.chunks):
            continue
        sent += upload([file], file.manifest, progress.of_file).bytes_sent
        progress.ended()
    return sent


def _assemble(node: Node, request: AssembleRequest) -> Assembled:
    return node.call("assemble_folder", request, Assembled, timeout_s=ASSEMBLE_TIMEOUT_S)


class FolderProgress:
    """One progress of several files."""

    def __init__(self, total: int, listener: ProgressListener | None) -> None:
        self._total = total
        self._listener = listener
        self._before = TransferProgress(0, total, 0.0, None)
        self._now = self._before

    def begin(self, already_there: int) -> None:
        """So much of all is there, by whatever way."""
        before = self._before
        saved = before.bytes_saved + already_there - before.bytes_done
        self._before = dataclasses.replace(before, bytes_done=already_there, bytes_saved=saved)

    def of_file(self, progress: TransferProgress) -> None:
        before, rate = self._before, progress.bytes_per_s
        done = before.bytes_done + progress.bytes_done
        self._now = dataclasses.replace(
            progress,
            bytes_done=done,
            bytes_total=self._total,
            eta_s=(self._total - done) / rate if rate > 0 else None,
            bytes_saved=before.bytes_saved + progress.bytes_saved,
            bytes_reused=before.bytes_reused + progress.bytes_reused,
            bytes_packed=before.bytes_packed + progress.bytes_packed,
        )
        if self._listener is not None:
            self._listener(self._now)

    def ended(self) -> None:
        self._before = self._now


class JoinedSource:
    """Several sources, one behind the other. A span that is asked for lies within one; that is opened for it alone."""

    def __init__(self, parts: Sequence[tuple[int, Callable[[], Source]]], changed: LocalFileChangedError) -> None:
        """`parts`: size and how to open it, of each."""
        self._parts = [(size, opener) for size, opener in parts if size]
        self._changed = changed
        self._starts: list[int] = []
        size = 0
        for part_size, _ in self._parts:
            self._starts.append(size)
            size += part_size

    def send(self, channel: FrameChannel, offset: int, count: int) -> int:
        source, within = self._open(offset)
        try:
            return source.send(channel, within, count)
        finally:
            source.close()

    def read(self, offset: int, count: int) -> bytes:
        source, within = self._open(offset)
        try:
            return source.read(within, count)
        finally:
            source.close()

    def body(self, _offset: int, _count: int, /) -> tuple[int, bytes] | None:
        return None

    def changed(self) -> LocalFileChangedError:
        return self._changed

    def close(self) -> None:
        return

    def _open(self, offset: int) -> tuple[Source, int]:
        index = bisect.bisect_right(self._starts, offset) - 1
        return self._parts[index][1](), offset - self._starts[index]
