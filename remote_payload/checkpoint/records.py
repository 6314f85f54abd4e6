"""What every format's reader hands over: where the bytes lie, and the tree that refers to them."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional, Protocol

from remote_payload.checkpoint.inert import StorageRef, Symbol
from remote_payload.checkpoint.limits import Cost, Limits
from remote_payload.checkpoint.source import Source
from remote_payload.wire.results import Dimension, Finding, Severity


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One file of a checkpoint. A single-file checkpoint has one; shards are named in order."""

    path: str
    size: int


@dataclasses.dataclass(frozen=True)
class Record:
    """A span of a file that stands for itself: a zip member, a legacy storage, a safetensors tensor.

    `crc32` is None where the format has no checksum or the writer left it out. `readable` is False for compressed or
    misplaced records, whose bytes nobody should take for tensors.
    """

    name: str
    file: int
    offset: int
    size: int
    crc32: Optional[int] = None
    readable: bool = True


@dataclasses.dataclass
class RawCheckpoint:
    """A format reader's result. `storages` maps a storage's key to its record."""

    format: str
    root: object
    files: tuple[DataFile, ...]
    records: tuple[Record, ...]
    storages: dict[str, Record]
    byte_order: str = "little"
    format_version: Optional[str] = None
    symbols: tuple[Symbol, ...] = ()
    storage_refs: tuple[StorageRef, ...] = ()
    """Every storage that the tree's tensors refer to, so that files can be joined under keys of their own."""
    cost: Cost = dataclasses.field(default_factory=Cost)
    directory_lost: bool = False
    """The file ends before what says where the tensors lie."""
    optimizer_key: Optional[str] = None
    """The root's key below which every tensor is the optimizer's, where a format keeps them flat."""
    problems: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder and the names in it."""

    path: str
    names: frozenset[str]


class FolderReader(Protocol):
    """One checkpoint format that is a folder of files."""

    def recognises(self, folder: Folder) -> bool:
        """Whether a folder with these names is of this format."""

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        """Describe the folder without executing anything. Raises `CheckpointError`."""


class FormatReader(Protocol):
    """One checkpoint format held in one file."""

    def recognises(self, head: bytes) -> bool:
        """Whether a file that begins with `head` claims to be of this format."""

    def read(self, source: Source, limits: Limits) -> RawCheckpoint:
        """Describe the file without executing anything. Raises `CheckpointError`."""


def integrity_problem(
    finding_id: str, title: str, where: tuple[str, ...], evidence: dict[str, Any], explanation: str, action: str = ""
) -> Finding:
    """An error in the dimension integrity; at most 50 places are named."""
    return Finding(
        id=finding_id,
        severity=Severity.ERROR,
        title=title,
        dimension=Dimension.INTEGRITY,
        where=where[:50],
        evidence=evidence,
        explanation=explanation,
        refuted_by="A second copy of the file, read from its source, that does not show this.",
        action=action or "Copy the file again and compare sizes and checksums; else save the checkpoint anew.",
    )
