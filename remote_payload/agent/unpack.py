"""Unpacking the user's code archive: a tar of plain files, and nothing else."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tarfile
from typing import BinaryIO

from remote_payload.agent import files, root
from remote_payload.agent.failure import AgentError
from remote_payload.wire.messages import Unpacked, UnpackRequest
from remote_payload.wire.names import check_sha256

MAX_FILES = 20_000
MAX_BYTES = 512 * 1024 * 1024
_MAX_PATH = 512


def unpack_code(request: UnpackRequest) -> Unpacked:
    """Unpack the archive into the folder named by its sha256, in one step. Done before: answered at once.

    Raises `AgentError` integrity for another digest, a link, a device, a path that leads out, or too much of anything.
    """
    layout = root.open_root(request.root)
    target = layout.code_folder(check_sha256(request.sha256))
    if os.path.isdir(target):
        os.utime(target)
        return Unpacked(target)
    os.makedirs(layout.code, mode=0o700, exist_ok=True)
    prepared = os.path.join(layout.code, f".unpacking-{secrets.token_hex(8)}")
    try:
        with _open_regular(request.archive_path) as archive:
            _check_digest(archive, request.sha256)
            archive.seek(0)
            os.mkdir(prepared, 0o700)
            _extract(archive, prepared)
        try:
            os.rename(prepared, target)
        except OSError:
            if not os.path.isdir(target):
                raise
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    files.fsync_folder(layout.code)
    return Unpacked(target)


def _open_regular(path: str) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AgentError("not_found", f"there is no code archive at {path}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AgentError("integrity", f"the code archive {path} is no regular file")
    return open(descriptor, "rb")


def _check_digest(archive: BinaryIO, wanted: str) -> None:
    digest = hashlib.sha256()
    for block in iter(lambda: archive.read(1 << 20), b""):
        digest.update(block)
    if digest.hexdigest() != wanted:
        raise AgentError("integrity", "the code archive is not what its digest says", "Send it again.")


def _extract(archive: BinaryIO, folder: str) -> None:
    count, total = 0, 0
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as members:
            for member in members:
                count, total = count + 1, total + member.size
                if count > MAX_FILES or total > MAX_BYTES:
                    raise AgentError("integrity", f"the code archive holds over {MAX_FILES} files or {MAX_BYTES} bytes")
                parts = _safe_parts(member)
                if member.isfile():
                    _write(members.extractfile(member), os.path.join(folder, *parts), member)
                elif not member.isdir():
                    raise AgentError("integrity", f"the code archive holds {member.name[:120]!r}, no plain file")
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise AgentError("integrity", f"the code archive is damaged: {error}") from error


def _safe_parts(member: tarfile.TarInfo) -> list[str]:
    parts = member.name.split("/")
    if len(member.name) > _MAX_PATH or not all(part not in ("", ".", "..") and "\0" not in part for part in parts):
        raise AgentError("integrity", f"the code archive holds the path {member.name[:120]!r}")
    return parts


def _write(source: object, path: str, member: tarfile.TarInfo) -> None:
    if not hasattr(source, "read"):
        raise AgentError("integrity", f"the code archive holds {member.name[:120]!r} without contents")
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    mode = 0o700 if member.mode & stat.S_IXUSR else 0o600
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
