"""Putting a checkpoint folder together in the store, from files that have arrived there and were verified."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from typing import BinaryIO, Optional

from remote_payload.agent import files, partial_file, root, store, verified
from remote_payload.agent.failure import AgentError
from remote_payload.agent.stored_chunks import StoredChunks
from remote_payload.agent.verified import FileState
from remote_payload.wire.chunk_table import ChunkTable, pack_chunks
from remote_payload.wire.chunks import CHUNK_BYTES, ChunkManifest, digest_file, file_digest
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.members import Member, MemberList, check_members, folder_digest, joined
from remote_payload.wire.messages import Assembled, AssembleRequest

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_AGAIN = "Run it again: what is missing is sent again."


def assemble_folder(request: AssembleRequest) -> Assembled:
    """Where the folder is, whole: found, or put together and renamed into the store in one step.

    Raises `WireError` for names that could lead elsewhere, `AgentError` integrity where a stored file is not what its
    name says.
    """
    layout = root.open_root(request.root)
    members = request.members
    check_members(members)
    digest = folder_digest(members)
    tree = layout.checkpoint_tree(digest)
    if _is_used(layout, digest, request):
        return Assembled(tree)
    was_there = os.path.lexists(tree)
    if was_there and StoredChunks(layout, digest).verify():
        return Assembled(tree, was_read=True)
    missing = _missing(layout, request)
    if missing:
        return Assembled(None, missing, was_changed=was_there)
    staging = layout.staging(secrets.token_hex(16))
    try:
        _fill(layout, request, staging, digest)
        _put_in_place(staging, layout, digest)
    except FileNotFoundError:
        missing = _missing(layout, request)  # deleted since it was looked for
        if not missing:
            raise
        return Assembled(None, missing, was_changed=was_there)
    finally:
        shutil.rmtree(staging.root, ignore_errors=True)
    if not (_is_used(layout, digest, request) or StoredChunks(layout, digest).verify()):
        raise AgentError("conflict", f"another process keeps changing {layout.checkpoint_folder(digest)}", _AGAIN)
    with verified.renewed(layout, digest, [os.path.join(tree, member.path) for member in members]):
        _drop_parts(layout, request)
    return Assembled(tree, was_changed=was_there)


def _is_used(layout: NodeLayout, digest: str, request: AssembleRequest) -> bool:
    """Whether the folder stands there whole, and stays for the run from now on."""
    size = sum(member.size for member in request.members)
    return store.find_tree(layout, digest, size, request.run_id) is not None


def _parts(request: AssembleRequest) -> dict[str, int]:
    """Digest and size of every stored file that the folder is made of."""
    parts = {member.digest: member.size for member in request.members if not member.is_packed}
    packed = sum(member.size for member in request.members if member.is_packed)
    return {**parts, request.pack_digest: packed} if packed else parts


def _missing(layout: NodeLayout, request: AssembleRequest) -> tuple[str, ...]:
    """What the store lacks. What is there stays for the run from now on."""
    parts = _parts(request).items()
    return tuple(digest for digest, size in parts if store.find(layout, digest, size, request.run_id) is None)


def _fill(layout: NodeLayout, request: AssembleRequest, staging: NodeLayout, digest: str) -> None:
    """Make the folder's whole entry of the store, durably."""
    tree = staging.checkpoint_tree(digest)
    os.makedirs(tree, mode=0o700)
    folders = {tree}
    manifests = []
    placed = []
    has_pack = request.pack_digest in _parts(request)
    with _open_stored(layout, request.pack_digest) if has_pack else io.BytesIO() as pack:
        for member in request.members:
            target = os.path.join(tree, member.path)
            folder = os.path.dirname(target)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            folders.add(folder)
            place = _place_packed(pack, member, target) if member.is_packed else _place_stored(layout, member, target)
            manifests.append(place)
            placed.append(verified.state_at(target))
    whole = joined(manifests)
    partial_file.write_manifest(staging, digest, ChunkTable(pack_chunks(whole.chunks), whole.size))
    files.replace(staging.checkpoint_members(digest), files.json_bytes(to_json(MemberList(request.members))))
    verified.record(staging, digest, [_as_placed(layout, tree, *one) for one in zip(request.members, placed)])
    files.write_new(staging.checkpoint_lock(digest), b"")  # whoever frees and whoever uses it take turns by it
    for folder in sorted(folders, reverse=True):
        files.fsync_folder(folder)


def _as_placed(layout: NodeLayout, tree: str, member: Member, placed: Optional[FileState]) -> Optional[FileState]:
    """How the file stands now, if it has got no more than another name since it was placed: that of a second member
    with its content."""
    now = verified.state_at(os.path.join(tree, member.path))
    return now if now in (placed, *verified.recorded(layout, member.digest, 1)) else None


def _place_packed(pack: BinaryIO, member: Member, target: str) -> ChunkManifest:
    data = pack.read(member.size)
    manifest = digest_file(io.BytesIO(data), len(data))
    _check(member, manifest)
    files.write_new(target, data)
    os.chmod(target, 0o400)
    return manifest


def _place_stored(layout: NodeLayout, member: Member, target: str) -> ChunkManifest:
    """The same file under another name, or a verified copy where the file system has no hard links."""
    manifest = None
    stored = layout.checkpoint(member.digest)
    try:
        with verified.renewed(layout, member.digest, [stored]):
            os.link(stored, target)
        if verified.recorded(layout, member.digest, 1) == [verified.state_at(target)]:
            manifest = _known_manifest(layout, member)
    except OSError as error:
        if error.errno not in files.NO_HARD_LINKS:
            raise
        with _open_stored(layout, member.digest) as source, open(target, "xb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(target, 0o400)
    if manifest is None:
        with open(target, "rb") as file:
            manifest = digest_file(file, member.size)
    _check(member, manifest)
    return manifest


def _known_manifest(layout: NodeLayout, member: Member) -> Optional[ChunkManifest]:
    """What stands beside the stored file, if it tells of that."""
    with contextlib.suppress(ValueError):
        manifest = from_json(ChunkManifest, files.read_json(layout.checkpoint_manifest(member.digest)))
        if (file_digest(manifest.chunks), manifest.size) == (member.digest, member.size):
            return manifest
    return None


def _check(member: Member, manifest: ChunkManifest) -> None:
    if (manifest.digest, manifest.size) != (member.digest, member.size):
        raise AgentError("integrity", f"{member.path} is not what its digest says", _AGAIN)


def _drop_parts(layout: NodeLayout, request: AssembleRequest) -> None:
    """Delete the stored files that the folder was made of, which holds their content now, but for those that somebody
    else needs."""
    parts = [file for file in store.stored_files(layout) if file.digest in _parts(request)]
    pinned = store.pins(layout, parts)
    for file in parts:
        if set(pinned.get(file.folder, ())) <= {request.run_id}:
            store.free(layout, file)


def _open_stored(layout: NodeLayout, digest: str) -> BinaryIO:
    return open(os.open(layout.checkpoint(digest), _OPEN), "rb")


def _put_in_place(staging: NodeLayout, layout: NodeLayout, digest: str) -> None:
    """Rename it to its final name. Another call may have been first; what stands there and is not believed goes."""
    made, target = staging.checkpoint_folder(digest), layout.checkpoint_folder(digest)
    with contextlib.suppress(OSError):
        os.rename(made, target)
        files.fsync_folder(layout.checkpoints)
        return
    if not StoredChunks(layout, digest).is_believed:
        with contextlib.suppress(OSError):
            # Whoever used what stood there needs this as well.
            shutil.copyfile(layout.checkpoint_uses(digest), staging.checkpoint_uses(digest))
        doomed = store.move_away(layout, target)
        os.rename(made, target)
        files.fsync_folder(layout.checkpoints)
        shutil.rmtree(doomed, ignore_errors=True)
