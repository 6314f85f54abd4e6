"""Joins the files of a checkpoint that has several: one budget, one list of records, storage keys that cannot clash."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from types import TracebackType
from typing import Optional

from remote_payload.checkpoint.errors import (
    CheckpointError,
    MalformedCheckpointError,
    MissingCheckpointError,
    NotACheckpointError,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
)
from remote_payload.checkpoint.inert import StorageRef, Symbol
from remote_payload.checkpoint.limits import Cost, Limits
from remote_payload.checkpoint.records import DataFile, FormatReader, RawCheckpoint, Record
from remote_payload.checkpoint.security import unsafe_global_findings
from remote_payload.checkpoint.source import Source, SourceWindow
from remote_payload.checkpoint.torch_legacy import TorchLegacyReader
from remote_payload.checkpoint.torch_zip import TorchZipReader
from remote_payload.wire.codec import WireError
from remote_payload.wire.names import check_artifact_path
from remote_payload.wire.results import Finding

_HEAD_BYTES = 512
_SPAN_RECORDS = 20_000
_SPAN_DIRECTORY_BYTES = 4 * 1024 * 1024
"""A span holds one tensor or one object; there may be hundreds of thousands of spans."""
_READERS: tuple[FormatReader, ...] = (TorchZipReader(), TorchLegacyReader())


class Parts:
    """The torch files of one folder, each opened once. Context manager.

    `read` and `read_span` give the tree of a file, or of a span that is a torch file by itself, and take what belongs
    to it into `raw`. Raises `CheckpointError`; names that lead out of the folder are refused.
    """

    def __init__(self, folder: str, format_name: str, limits: Limits) -> None:
        self.folder = folder
        self.raw = RawCheckpoint(format_name, {}, (), (), {})
        self._limits = limits
        self._stack = ExitStack()
        self._files: dict[str, tuple[int, Source]] = {}
        self._records: list[Record] = []
        self._symbols: dict[str, Symbol] = {}
        self._parts = 0
        self._found_in_lost: list[Finding] = []

    def source(self, name: str, *, links_may_leave: bool = True) -> Source:
        """The open file `name` of the folder."""
        return self._open(name, links_may_leave)[1]

    def read(self, name: str) -> object:
        index, source = self._open(name, links_may_leave=True)
        return self._take(source, index, 0, name, self._limits)

    def read_span(self, name: str, offset: int, length: int) -> object:
        """As `read` for a part of a file. Links out of the folder are refused: only metadata names these files."""
        index, source = self._open(name, links_may_leave=False)
        if offset < 0 or length <= 0 or offset + length > source.size:
            raise TruncatedCheckpointError(f"{name} ends at byte {source.size}, {offset + length} bytes are needed")
        limits = dataclasses.replace(self._limits, records=_SPAN_RECORDS, directory_bytes=_SPAN_DIRECTORY_BYTES)
        return self._take(SourceWindow(source, offset, length), index, offset, f"{name}+{offset}", limits)

    def read_pickle(self, source: Source) -> bytes:
        """All of a small file that is a pickle, out of the budget."""
        if source.size > self._limits.pickle_bytes:
            raise MalformedCheckpointError(
                f"{source.path} of {source.size} bytes is beyond {self._limits.pickle_bytes}"
            )
        return source.read(0, source.size)

    def charge(self, symbols: tuple[Symbol, ...], cost: Cost) -> None:
        """Note the globals that a pickle named, and take what it cost out of the budget."""
        self._limits = self._limits.after(cost)
        for symbol in symbols:
            known = self._symbols.setdefault(symbol.full_name, symbol)
            known.called = known.called or symbol.called

    @property
    def limits(self) -> Limits:
        """What is left of the budget."""
        return self._limits

    def finish(self, root: object) -> RawCheckpoint:
        """The joined description."""
        self.raw.root = root
        self.raw.files = tuple(DataFile(source.path, source.size) for _, source in self._files.values())
        self.raw.records = tuple(self._records)
        self.raw.symbols = tuple(self._symbols.values())
        # What a part that could not be read would have run is known all the same.
        self.raw.problems.extend(self._found_in_lost)
        return self.raw

    def _open(self, name: str, links_may_leave: bool) -> tuple[int, Source]:
        known = self._files.get(name)
        if known is None:
            if len(self._files) >= self._limits.shards:
                raise MalformedCheckpointError(f"{self.folder} has more than {self._limits.shards} files")
            path = path_inside(self.folder, name, links_may_leave=links_may_leave)
            try:
                source = self._stack.enter_context(Source(path))
            except MissingCheckpointError:
                raise TruncatedCheckpointError(f"the file {name[:200]!r} of the checkpoint does not exist") from None
            known = self._files[name] = (len(self._files), source)
        return known

    def _take(self, source: Source, index: int, shift: int, label: str, limits: Limits) -> object:
        try:
            part = _read_torch_file(source, limits)
        except CheckpointError as error:
            self._limits = self._limits.after(error.cost)
            self._found_in_lost.extend(error.findings)
            raise
        self.charge(part.symbols, part.cost)
        if self._parts and part.byte_order != self.raw.byte_order:
            raise UnsupportedCheckpointError(f"the files of {self.folder} differ in byte order")
        self.raw.byte_order = part.byte_order
        if len(self._records) + len(part.records) > self._limits.records:
            raise MalformedCheckpointError(f"the files of {self.folder} have more than {self._limits.records} records")
        prefix = f"{self._parts}:"
        self._parts += 1
        moved = {id(r): _moved(r, index, shift, label) for r in part.records}
        self._records.extend(moved[id(r)] for r in part.records)
        for key, record in part.storages.items():
            self.raw.storages[prefix + key] = moved[id(record)]
        for storage in part.storage_refs:
            storage.key = prefix + storage.key
        self.raw.directory_lost = self.raw.directory_lost or part.directory_lost
        self.raw.problems.extend(dataclasses.replace(p, title=f"{label[:200]}: {p.title}") for p in part.problems)
        return part.root

    def missing_storage(self, dtype: str, numel: int) -> StorageRef:
        """A storage that nothing holds, for tensors whose bytes could not be found."""
        self._parts += 1
        return StorageRef(f"{self._parts}:missing", dtype, numel)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._stack.close()
        if isinstance(error, CheckpointError):
            error.findings = (*error.findings, *unsafe_global_findings(tuple(self._symbols.values())))


def path_inside(folder: str, name: str, *, links_may_leave: bool) -> str:
    """The path of a file that a checkpoint names, below its folder.

    Raises `MalformedCheckpointError` for absolute names and those with `..`. Links out of the folder are how model
    hubs keep their caches; where only metadata of the checkpoint's own vouches for a name they are refused as well.
    """
    try:
        check_artifact_path(name)
    except WireError:
        raise MalformedCheckpointError(f"the checkpoint names {name[:200]!r}, which is no plain file name") from None
    if not links_may_leave:
        refuse_link_out(folder, name)
    return os.path.join(folder, name)


def refuse_link_out(folder: str, name: str) -> None:
    """Raises `MalformedCheckpointError` if `name` is a link, or below one, that leads out of `folder`."""
    real = os.path.realpath(folder)
    if os.path.commonpath((real, os.path.realpath(os.path.join(folder, name)))) != real:
        raise MalformedCheckpointError(f"the checkpoint's file {name[:200]!r} is a link out of its folder")


def _read_torch_file(source: Source, limits: Limits) -> RawCheckpoint:
    head = source.read(0, min(source.size, _HEAD_BYTES))
    for reader in _READERS:
        if reader.recognises(head):
            return reader.read(source, limits)
    if not source.size:
        raise TruncatedCheckpointError(f"{source.path} is empty")
    raise NotACheckpointError(f"{source.path} is no torch file")


def _moved(record: Record, file: int, shift: int, label: str) -> Record:
    return dataclasses.replace(record, name=f"{label}/{record.name}", file=file, offset=record.offset + shift)


def reason(error: CheckpointError) -> str:
    """An error as evidence: its kind and a bounded part of its words."""
    return f"{error.kind}: {str(error)[:300]}"
