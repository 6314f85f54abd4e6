"""The stream verb `send`: spans of files to the client, each with the SHA-256 of what was sent."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import Union

from remote_payload.agent import root
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.failure import AgentError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import (
    HEADER_BYTES,
    MAX_SPAN_BYTES,
    DamagedStreamError,
    FrameKind,
    FrameReader,
    SendRequest,
    SpanEnd,
    SpanFacts,
    StreamFailure,
    Want,
    decode_json,
    encode_data_header,
)

PIECE_BYTES = 1024 * 1024
_OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FETCH_AGAIN = "Fetch it again when it is complete."
_NO_SUCH = (errno.ENOENT, errno.ENOTDIR)


def serve_send(channel: FdChannel, request: SendRequest) -> None:
    """Answer wants until the client closes its end (`PeerGoneError`). A want that fails does not end the stream."""
    channel.idle_s = request.idle_s
    layout = root.open_root(request.root)
    reader = FrameReader(channel.fill)
    buffer = memoryview(bytearray(HEADER_BYTES + PIECE_BYTES))
    while True:
        header = reader.header()
        if header.kind is not FrameKind.WANT:
            raise DamagedStreamError(f"a {header.kind.name} frame arrived out of turn")
        want = decode_json(Want, reader.body(header))
        try:
            _serve_want(channel, layout, want, buffer)
        except AgentError as error:
            channel.send_json(FrameKind.FAILURE, StreamFailure(error.failure))


def _serve_want(channel: FdChannel, layout: NodeLayout, want: Want, buffer: memoryview) -> None:
    fd = open_wanted(layout, want.path)
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise AgentError("usage", f"{want.path} is no regular file")
        if want.offset < 0 or not 0 <= want.length <= MAX_SPAN_BYTES:
            raise AgentError("usage", f"{want.length} bytes at {want.offset} cannot be sent")
        if want.offset > before.st_size:
            raise AgentError("integrity", f"{want.path} became shorter: it has {before.st_size} bytes", _FETCH_AGAIN)
        length = min(want.length, before.st_size - want.offset)
        facts = SpanFacts(before.st_size, before.st_mtime_ns, before.st_ino, want.offset, length)
        channel.send_json(FrameKind.SPAN, facts)
        digest = hashlib.sha256()
        for offset in range(want.offset, want.offset + length, PIECE_BYTES):
            count = min(PIECE_BYTES, want.offset + length - offset)
            piece = buffer[HEADER_BYTES : HEADER_BYTES + count]
            _read_exactly(fd, piece, offset, want.path)
            digest.update(piece)
            if not want.digest_only:
                buffer[:HEADER_BYTES] = encode_data_header(offset, count)
                channel.send(buffer[: HEADER_BYTES + count])
        after = os.fstat(fd)
    finally:
        os.close(fd)
    if not want.may_grow and (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AgentError("integrity", f"{want.path} changed while it was read", _FETCH_AGAIN)
    channel.send_json(FrameKind.END, SpanEnd(digest.hexdigest()))


def open_wanted(layout: NodeLayout, path: str) -> int:
    """A file descriptor of what is wanted.

    Below the node root no symbolic link is followed, at any step: a job must not be able to show us another file than
    one that it wrote. Any other path is the person's own and is followed. Raises `AgentError`.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise AgentError("usage", f"{path!r} is no absolute path")
    try:
        if path.startswith(layout.root + "/"):
            return _open_beneath(layout.root, path[len(layout.root) + 1 :])
        return os.open(path, _OPEN_FILE)
    except OSError as error:
        raise _explain(error, path) from error


def _open_beneath(base: str, relative: str) -> int:
    *folders, name = relative.split("/")
    if {"", ".", ".."} & {*folders, name}:
        raise AgentError("usage", f"{relative!r} is no plain path below the node root")
    folder_fd = os.open(base, _OPEN_FOLDER)
    try:
        for folder in folders:
            next_fd = os.open(folder, _OPEN_FOLDER, dir_fd=folder_fd)
            os.close(folder_fd)
            folder_fd = next_fd
        return os.open(name, _OPEN_FILE | os.O_NOFOLLOW, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)


def _read_exactly(fd: int, view: memoryview, offset: int, path: str) -> None:
    while view:
        count = _read_at(fd, view, offset)
        if not count:
            raise AgentError("integrity", f"{path} became shorter while it was read", _FETCH_AGAIN)
        view, offset = view[count:], offset + count


def _read_at(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def _explain(error: OSError, path: str) -> Union[AgentError, OSError]:
    if error.errno in _NO_SUCH:
        return AgentError("not_found", f"there is no {path} on the node, or a symbolic link stands in its way")
    if error.errno == errno.ELOOP:
        return AgentError("integrity", f"{path} is a symbolic link, which is not followed")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AgentError("usage", f"{path} may not be read by this user")
    return AgentError("unfit", f"{path} cannot be read: {error.strerror}")
