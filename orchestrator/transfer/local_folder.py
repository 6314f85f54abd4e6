"""A checkpoint that is a folder of this machine: its files are read, and hashed, beside whatever else goes on."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.errors import CheckpointError, UsageError
from orchestrator.layout import LocalLayout
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.folder import Folder, FolderFile, JoinedSource
from orchestrator.transfer.source import LocalFile, LocalFileChangedError, Source
from remote_payload.wire.chunks import ChunkManifest, Fingerprint, digest_file
from remote_payload.wire.folders import UnsendableError, folder_fingerprint, sendable_files
from remote_payload.wire.members import PACKED_BELOW, Member
from remote_payload.wire.names import printable

_WHEN_COMPLETE = "Wait until it is written completely, or evaluate a copy of it; then run this again."


class _BrokenOffError(Exception):
    """Nobody wants the folder's digest any more."""


class LocalFolder:
    """Reads a folder once, in a thread of its own, for the time of the context."""

    def __init__(self, path: Path, layout: LocalLayout, *, use_remembered: bool = True) -> None:
        """Raises `CheckpointError`: unreadable, a name or a link that must not travel."""
        self.path = path
        self._layout = layout
        self._use_remembered = use_remembered
        self._fingerprint = read_folder_fingerprint(path)
        self._listed = _list(path)
        self._hashed: list[FolderFile] = []
        self._is_read = False
        self._is_broken_off = False
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(1, "folder")
        self._reading = self._pool.submit(self._read)

    @property
    def size(self) -> int:
        return sum(size for _, size in self._listed)

    @property
    def is_read(self) -> bool:
        return self._is_read

    @property
    def folder(self) -> Folder:
        """All of it, once it is read. Raises `CheckpointError` (unreadable), `IntegrityError` (changed)."""
        return self._reading.result()

    def hashed_before_others(self) -> Iterator[FolderFile]:
        """Those of the large files that have been hashed, each as soon as it is, while others are not yet."""
        count = 0
        while True:
            with self._changed:
                while len(self._hashed) == count and not self._is_read:
                    self._changed.wait()
                if self._is_read:
                    return
                file = self._hashed[count]
            count += 1
            if not file.member.is_packed:
                yield file

    def check_unchanged(self, doing: str = "sent") -> None:
        """Raises `LocalFileChangedError`: the folder is not what was read any more."""
        if read_folder_fingerprint(self.path) != self._fingerprint:
            raise self._was_changed(doing)

    def open(self, files: Sequence[FolderFile]) -> Source:
        """These files, one behind the other."""
        return JoinedSource(
            [(file.member.size, functools.partial(self._open, self.path / file.member.path)) for file in files],
            self._was_changed("sent"),
        )

    def close(self) -> None:
        self._is_broken_off = True
        self._pool.shutdown()

    def __enter__(self) -> LocalFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def begun(self, spans: Sequence[tuple[int, int]], /) -> Sequence[int]:
        """For `digest_local_file`."""
        return range(len(spans))

    def hashed(self, _index: int, _sha256: bytes, /) -> None:
        """For `digest_local_file`."""
        if self._is_broken_off:
            raise _BrokenOffError

    def _read(self) -> Folder:
        try:
            for name, size in self._listed:
                file = self._read_file(name, size)
                with self._changed:
                    self._hashed.append(file)
                    self._changed.notify_all()
            self.check_unchanged("read")
            return Folder(tuple(self._hashed))
        finally:
            with self._changed:
                self._is_read = True
                self._changed.notify_all()

    def _read_file(self, name: str, size: int) -> FolderFile:
        if self._is_broken_off:
            raise _BrokenOffError
        path = self.path / name
        if size < PACKED_BELOW:
            manifest = _digest_small(path)
        else:
            manifest = digest_local_file(path, self._layout, self, use_remembered=self._use_remembered).manifest
        return FolderFile(Member(name, manifest.size, manifest.digest), manifest)

    def _open(self, path: Path) -> LocalFile:
        try:
            return LocalFile(path)
        except UsageError:
            self.check_unchanged()
            raise

    def _was_changed(self, doing: str) -> LocalFileChangedError:
        return LocalFileChangedError(f"{self.path} changed while it was being {doing}", action=_WHEN_COMPLETE)


def _list(path: Path) -> list[tuple[str, int]]:
    """(name, size) of every file that counts, in order."""
    try:
        return [(name, facts.st_size) for name, facts in sendable_files(str(path))]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror}") from error
    except UnsendableError as error:
        raise CheckpointError(printable(str(error)), action=error.action) from error


def read_folder_fingerprint(path: Path) -> Fingerprint:
    """`folder_fingerprint` of a folder here. Raises `CheckpointError`."""
    try:
        return folder_fingerprint(str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be listed: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(error), action="Name the folder of one checkpoint.") from error


def _digest_small(path: Path) -> ChunkManifest:
    """Sooner read than looked up."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest_file(io.BytesIO(data), len(data))
