"""Requests and replies of the agent's verbs.

A call is `{"verb", "nonce", "protocol", "params"}`; a reply is `{"ok": ...}` or `{"error": …}` with a
`failures.RemoteFailure`. Params and results are the dataclasses below through `codec`. Every path in them is absolute
on the node.

| verb | params | result | repeatable |
| --- | --- | --- | --- |
| hello | HelloRequest | Hello | yes |
| preflight | PreflightRequest | Preflight | yes |
| locate | LocateRequest | Located | yes |
| known_chunks | KnownRequest | KnownChunks | yes |
| list_files | ListRequest | FileList | yes |
| chunk_manifest | ListRequest | FileManifest | yes |
| folder_manifest | ListRequest | FolderManifest | yes |
| inspect | InspectRequest | `header`, `findings`, `text` as JSON | yes |
| claim | ClaimRequest | Claimed | yes: the same nonce claims once |
| launch | AttemptRef | Launched | yes: the decision file lets one supervisor start |
| void | AttemptRef | Decided | yes |
| status | StatusRequest | StatusReply | yes |
| cancel | AttemptRef | Decided | yes |
| manifest | AttemptRef | Manifest | yes |
| unpack_code | UnpackRequest | Unpacked | yes |
| assemble_folder | AssembleRequest | Assembled | yes |
| gc | GcRequest | GcReport | yes |
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any, Optional

from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.codec import WireError
from remote_payload.wire.members import Member


@dataclasses.dataclass(frozen=True)
class HelloRequest:
    """`root` may begin with `~` or hold `$VARIABLES` of the node; hello expands it and creates it when asked."""

    root: str
    create: bool = True


@dataclasses.dataclass(frozen=True)
class Hello:
    protocol: int
    payload_sha256: Optional[str]
    machine_id: str
    boot_id: str
    hostname: str
    user: str
    home: str
    root: str
    root_writable: bool
    python_version: str
    python_executable: str
    platform: str
    clock_unix_s: float
    free_bytes: int
    quota_free_bytes: Optional[int] = None


@dataclasses.dataclass(frozen=True)
class LocateRequest:
    """Find a file: by `path` in place, or by content (`digest`, `size`) in the store and under `search_roots`.

    `sample` holds [offset, length, sha256] spans that a same-size candidate must match before it is read in full.
    `time_limit_s` bounds the search by content: what was not found within it counts as nowhere. `run_id`: for whom, if
    for a run; a file of the store is not freed while that is under way.
    """

    root: str
    path: Optional[str] = None
    digest: Optional[str] = None
    size: Optional[int] = None
    search_roots: tuple[str, ...] = ()
    sample: tuple[tuple[Any, ...], ...] = ()
    time_limit_s: float = 100.0
    run_id: str = ""


@dataclasses.dataclass(frozen=True)
class Located:
    """`found` in `how` = in_place | store | by_content | nowhere. For in_place, `digest` may be None: not computed."""

    found: bool
    how: str
    path: Optional[str] = None
    digest: Optional[str] = None
    size: Optional[int] = None
    mtime_ns: Optional[int] = None
    inode: Optional[int] = None


PREFIX_BYTES = 8
"""So much of a chunk's SHA-256 says well enough which chunk is meant, where nothing depends on it."""


@dataclasses.dataclass(frozen=True)
class KnownRequest:
    """What the node may have of a file of `size` bytes, whose content is not known yet."""

    root: str
    size: int
    search_roots: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class KnownChunks:
    """`prefixes`: in base64 one after the other the first `PREFIX_BYTES` of the SHA-256 of chunks in the store.
    `is_size_there`: a file of that size lies under the search roots."""

    prefixes: str
    is_size_there: bool

    def as_set(self) -> frozenset[bytes]:
        prefixes = base64.b64decode(self.prefixes)
        return frozenset(prefixes[at : at + PREFIX_BYTES] for at in range(0, len(prefixes), PREFIX_BYTES))


@dataclasses.dataclass(frozen=True)
class ListRequest:
    """The file at `path`, or all files of the folder there; `~` and `$VARIABLES` of the node are expanded.

    `anew`: chunks are read even where what they were is remembered.
    """

    root: str
    path: str
    anew: bool = False


@dataclasses.dataclass(frozen=True)
class ListedFile:
    """`name` is relative to the listed folder, and empty where a file was asked for itself."""

    name: str
    size: int
    mtime_ns: int
    inode: int

    def __post_init__(self) -> None:
        if not -(2**63) <= self.mtime_ns < 2**63:
            raise WireError(f"no file has the time {self.mtime_ns} ns")


@dataclasses.dataclass(frozen=True)
class FileList:
    """`path` absolute on the node."""

    path: str
    is_folder: bool
    files: tuple[ListedFile, ...]


@dataclasses.dataclass(frozen=True)
class FileManifest(ChunkManifest):
    """The chunks of a file, and whether they were read earlier and are remembered."""

    was_remembered: bool = True


@dataclasses.dataclass(frozen=True)
class ReadFile:
    """A file as it was listed, and its chunks as they were read."""

    listed: ListedFile
    manifest: ChunkManifest


@dataclasses.dataclass(frozen=True)
class FolderManifest:
    """`path` absolute on the node; the files in the order of their names."""

    path: str
    files: tuple[ReadFile, ...]


@dataclasses.dataclass(frozen=True)
class InspectRequest:
    path: str
    root: str = "/"


@dataclasses.dataclass(frozen=True)
class UnpackRequest:
    """Unpack an uploaded, verified code archive (a tar of plain files) into its content-addressed folder."""

    root: str
    archive_path: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Unpacked:
    folder: str


KEEP_DAYS = 30.0


@dataclasses.dataclass(frozen=True)
class AssembleRequest:
    """Put the checkpoint folder of these files, in the order of their paths, together in the store.

    Small files (`members.PACKED_BELOW`) are taken from the pack, the stored file with the digest `pack_digest`, in
    which they stand in that order; every other one from the stored file with its digest. `run_id`: for whom, if for a
    run, as in `LocateRequest`.
    """

    root: str
    members: tuple[Member, ...]
    pack_digest: str
    run_id: str = ""


@dataclasses.dataclass(frozen=True)
class Assembled:
    """`path` of the complete folder; None, and the digests of the files that the store lacks for it. The stored copy of
    it may have been touched since it was verified: `was_read`: it was read in full and is what its digest says;
    `was_changed`: it is not, and is replaced."""

    path: Optional[str]
    missing: tuple[str, ...] = ()
    was_read: bool = False
    was_changed: bool = False


@dataclasses.dataclass(frozen=True)
class GcRequest:
    """Delete finished runs and unneeded files older than `keep_days`, and of the store what exceeds `keep_bytes`."""

    root: str
    keep_days: float = KEEP_DAYS
    keep_bytes: Optional[int] = None
    dry_run: bool = True
    pinned_runs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Deletable:
    """`last_used`: seconds since the epoch by the node's clock."""

    path: str
    size: int
    last_used: float


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A file of the store that stays, and the runs or uploads that need it."""

    path: str
    size: int
    by: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GcReport:
    """`deleted` lists what went, or would go on a dry run. `store_bytes`: what the store of checkpoints holds now."""

    deleted: tuple[Deletable, ...]
    freed_bytes: int
    store_bytes: int
    pinned: tuple[Pinned, ...]
    free_bytes: int
