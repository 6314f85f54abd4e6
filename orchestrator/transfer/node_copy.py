"""From one node's disk into another's store: straight (`direct.py`), or through this machine's memory, never its disk.

The first node says what the chunks are, the second verifies each against that: digests go from end to end. What has
arrived is in the second node's journal, so a copy that was cut is gone on with.
"""

from __future__ import annotations

import dataclasses
import posixpath
import struct
import time
from collections.abc import Sequence

from orchestrator.errors import IntegrityError, UsageError
from orchestrator.node import BULK_BYTES, Node
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import ReconnectPolicy, StreamOpener
from orchestrator.transfer.direct import DirectWay, packs_between
from orchestrator.transfer.folder import Folder, FolderFile, FolderProgress, SentFolder, send_folder
from orchestrator.transfer.node_files import DescribedFile, NodeFiles, changed_on_node
from orchestrator.transfer.node_lines import NodeLines
from orchestrator.transfer.progress import ProgressListener
from orchestrator.transfer.source import LocalFileChangedError
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.codec import WireError
from remote_payload.wire.members import Member, check_members
from remote_payload.wire.messages import FileList, FileManifest, FolderManifest, ListRequest, Located, LocateRequest
from remote_payload.wire.names import printable
from remote_payload.wire.packing_rates import PackingRates

LIST_TIMEOUT_S = 60.0
DIGEST_TIMEOUT_S = 900.0
"""A file is read in full on its node before its chunks are known."""


@dataclasses.dataclass(frozen=True)
class DescribedFolder:
    """A folder on a node, absolute `path`, as it was listed and read. `folder` is the same by content."""

    path: str
    files: tuple[DescribedFile, ...]
    folder: Folder


@dataclasses.dataclass(frozen=True)
class CopiedCheckpoint:
    """Where a copy stands, what it is, and how many bytes were sent for it. `is_complete` False: not all chunks were
    asked for, and jobs may read the others out of the part that is kept."""

    path: str
    digest: str
    size: int
    bytes_sent: int
    seconds: float
    is_direct: bool = False
    """Whether the bytes went straight, to the end."""
    is_complete: bool = True
    note: str = ""
    """What became of a stored copy that the node did not believe."""


def describe(node: Node, path: str, *, anew: bool = False) -> DescribedFile | DescribedFolder:
    """Ask `node` for what stands at `path`, chunk by chunk; `anew`: by reading it, whatever is remembered.

    Raises what `Node.call` does, and `IntegrityError` for an answer that cannot be.
    """
    listed = _list(node, path)
    request = ListRequest(node.root, path, anew)
    if listed.is_folder:
        found = node.call("folder_manifest", request, FolderManifest, timeout_s=DIGEST_TIMEOUT_S)
        return _described(found)
    manifest = node.call("chunk_manifest", request, FileManifest, timeout_s=DIGEST_TIMEOUT_S)
    return _checked(DescribedFile(listed.path, listed.files[0], manifest, manifest.was_remembered))


def copy_checkpoint(
    source: Node,
    described: DescribedFile | DescribedFolder,
    target: Node,
    *,
    way: DirectWay | None = None,
    streams: StreamPolicy | None = None,
    bandwidth_limit_bytes_per_s: float | None = None,
    on_progress: ProgressListener | None = None,
    run_id: str = "",
    order: Sequence[int] | None = None,
) -> CopiedCheckpoint:
    """Put what was `described` on `source` into `target`'s store, within the limits of both profiles. `way` is taken
    where the size is worth a login; None: all goes through this machine. `order`: of a file's chunks, as for
    `upload_file`. Raises as `NodeCopy`, and `LocalFileChangedError` for what is another by the end."""
    size = described.manifest.size if isinstance(described, DescribedFile) else described.folder.size
    if size < BULK_BYTES:
        way = None
    elif way is not None and isinstance(described, DescribedFile) and _stands(target, described.manifest, run_id):
        way = None  # no login where nothing is to go
    limits = (bandwidth_limit_bytes_per_s, *(node.profile.bandwidth_limit_bytes_per_s for node in (source, target)))
    copy = NodeCopy(
        source,
        way or target,
        streams=streams,
        bandwidth_limit_bytes_per_s=min((limit for limit in limits if limit is not None), default=None),
        packing=packs_between(source.profile, target.profile),
        run_id=run_id,
        store_limit_bytes=target.profile.store_limit_bytes,
    )
    began = time.monotonic()
    if isinstance(described, DescribedFile):
        done = _copy_file(copy, source, described, on_progress, order)
        if way is not None and way.has_worked:
            if done.is_complete:
                _check_that_it_stands(target, described.manifest, run_id)
            else:
                # The other node says itself what it has; nothing is sent where that is what it is said to have.
                again = _copy_file(dataclasses.replace(copy, target=target), source, described, None, order)
                done = dataclasses.replace(again, bytes_sent=done.bytes_sent + again.bytes_sent, note=done.note)
        path, digest, sent = done.path_on_node, described.manifest.digest, done.bytes_sent
        is_complete, note = done.is_complete, done.note
    else:
        folder = _copy_folder(copy, source, described, target, on_progress, run_id)
        path, digest, sent, is_complete = folder.path, described.folder.digest, folder.bytes_sent, True
        note = folder.note
    is_direct = way is not None and way.is_direct
    return CopiedCheckpoint(path, digest, size, sent, time.monotonic() - began, is_direct, is_complete, note)


@dataclasses.dataclass
class NodeCopy:
    """Puts files, one behind the other, from node to node, call after call over the same streams, which end with the
    context. `packing`: floats go in fewer bytes, packed by `source` and unpacked by `target`, where that saves time.
    Calls raise as `upload_file`, for either node."""

    source: StreamOpener
    target: StreamOpener
    streams: StreamPolicy | None = None
    bandwidth_limit_bytes_per_s: float | None = None
    packing: bool = True
    retry: ReconnectPolicy | None = None
    run_id: str = ""
    store_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        self._rates = PackingRates()
        self.carrier = Carrier(
            self.target,
            streams=self.streams,
            bandwidth_limit_bytes_per_s=self.bandwidth_limit_bytes_per_s,
            retry=self.retry,
            packing=False,
            rates=self._rates,
        )
        self._lines = NodeLines(self.source, self.carrier.retry, lambda: self.carrier.expected_bytes)

    def __enter__(self) -> NodeCopy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.carrier.close()
        self._lines.close()

    def __call__(
        self,
        files: Sequence[DescribedFile],
        manifest: ChunkManifest,
        on_progress: ProgressListener | None = None,
        order: Sequence[int] | None = None,
    ) -> UploadResult:
        return upload_file(
            self.carrier,
            NodeFiles(self._lines, files, self._rates, packing=self.packing),
            manifest,
            on_progress=on_progress,
            order=order,
            run_id=self.run_id,
            store_limit_bytes=self.store_limit_bytes,
        )


def _copy_file(
    copy: NodeCopy,
    source: Node,
    described: DescribedFile,
    on_progress: ProgressListener | None,
    order: Sequence[int] | None,
) -> UploadResult:
    try:
        with copy:
            copy.carrier.expect(described.manifest.size)
            return copy([described], described.manifest, on_progress, order)
    except LocalFileChangedError:
        raise
    except (UsageError, IntegrityError):
        # What the first node says of a file that it reads for the other.
        _check_unchanged(source, described)
        raise


def _check_that_it_stands(target: Node, manifest: ChunkManifest, run_id: str) -> None:
    """What came straight was said to have arrived by the node that sent it: ask the other one."""
    if not _stands(target, manifest, run_id):
        raise IntegrityError(
            "the file is not where the node that sent it says that it has arrived",
            action="Run it again with `direct_copies: false` in a profile, and tell that node's administrator.",
        )


def _stands(target: Node, manifest: ChunkManifest, run_id: str) -> bool:
    """Whether the target says that its store has the file."""
    request = LocateRequest(target.root, digest=manifest.digest, size=manifest.size, run_id=run_id)
    return target.call("locate", request, Located, timeout_s=LIST_TIMEOUT_S).how == "store"


def _copy_folder(
    copy: NodeCopy,
    source: Node,
    described: DescribedFolder,
    target: Node,
    on_progress: ProgressListener | None,
    run_id: str,
) -> SentFolder:
    by_name = {file.listed.name: file for file in described.files}

    def upload(files: Sequence[FolderFile], manifest: ChunkManifest, on_progress: ProgressListener) -> UploadResult:
        return copy([by_name[file.member.path] for file in files], manifest, on_progress)

    try:
        with copy:
            progress = FolderProgress(described.folder.size, on_progress)
            sent = send_folder(target, described.folder, copy.carrier, upload, progress, run_id=run_id)
    except (UsageError, IntegrityError):
        # A file that is gone is a folder that has changed.
        _check_unchanged(source, described)
        raise
    _check_unchanged(source, described)
    return sent


def is_unchanged(source: Node, described: DescribedFile | DescribedFolder) -> bool:
    """Whether it is listed now as it was when it was described."""
    files = (described,) if isinstance(described, DescribedFile) else described.files
    return _list(source, described.path).files == tuple(file.listed for file in files)


def _check_unchanged(source: Node, described: DescribedFile | DescribedFolder) -> None:
    if not is_unchanged(source, described):
        raise changed_on_node(described.path)


def _list(node: Node, path: str) -> FileList:
    return node.call("list_files", ListRequest(node.root, path), FileList, timeout_s=LIST_TIMEOUT_S)


def _described(found: FolderManifest) -> DescribedFolder:
    files = tuple(
        _checked(DescribedFile(posixpath.join(found.path, file.listed.name), file.listed, file.manifest))
        for file in found.files
    )
    folder = Folder(
        tuple(
            FolderFile(Member(file.listed.name, file.manifest.size, file.manifest.digest), file.manifest)
            for file in files
        )
    )
    try:
        check_members(folder.members)
    except WireError as error:
        raise _cannot_be(str(error)) from error
    return DescribedFolder(found.path, files, folder)


def _checked(file: DescribedFile) -> DescribedFile:
    """Refuse chunks that are not those of a file with its size and digest."""
    manifest = file.manifest
    try:
        digest = ChunkTable(pack_chunks(manifest.chunks), file.listed.size).file_digest()
    except (ValueError, struct.error) as error:
        raise _cannot_be(f"{file.path}: {error}") from error
    if (digest, file.listed.size) != (manifest.digest, manifest.size):
        raise _cannot_be(f"the chunks of {file.path} are those of another file")
    return file


def _cannot_be(what: str) -> IntegrityError:
    return IntegrityError(
        f"the node describes files that cannot be: {printable(what)}",
        action="Do not trust this node; tell its administrator.",
    )
