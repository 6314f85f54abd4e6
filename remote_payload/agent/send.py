"""The stream verb `send`: spans of files to the client, each with the SHA-256 of what was sent."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from typing import Union

from remote_payload.agent import root
from remote_payload.agent.background import Background
from remote_payload.agent.channel import FdChannel
from remote_payload.agent.failure import AgentError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.packing import pack_floats
from remote_payload.wire.stream import (
    HEADER_BYTES,
    MAX_DATA_BYTES,
    MAX_SPAN_BYTES,
    PACKED_ENCODING,
    RAW_ENCODING,
    Buffer,
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
    """Answer wants until the client leaves, or closes its end (`PeerGoneError`). One that fails ends nothing."""
    channel.idle_s = request.idle_s
    layout = root.open_root(request.root)
    reader = FrameReader(channel.fill)
    sender = _Sender(channel, layout)
    try:
        while True:
            header = reader.header()
            if header.kind not in (FrameKind.WANT, FrameKind.LEAVE):
                raise DamagedStreamError(f"a {header.kind.name} frame arrived out of turn")
            body = reader.body(header)
            if header.kind is FrameKind.LEAVE:
                return
            want = decode_json(Want, body)
            try:
                sender.serve(want)
            except AgentError as error:
                sender.await_sent()
                channel.send_json(FrameKind.FAILURE, StreamFailure(error.failure))
    finally:
        sender.await_sent()


class _Sender:
    """Answers to wants, in their order. The next one is packed while one that is packed is being sent."""

    def __init__(self, channel: FdChannel, layout: NodeLayout) -> None:
        self._channel = channel
        self._layout = layout
        self._sending = Background()
        self._buffer = memoryview(bytearray(HEADER_BYTES + PIECE_BYTES))

    def await_sent(self) -> None:
        self._sending.wait()

    def serve(self, want: Want) -> None:
        """Raises `AgentError`, `PeerGoneError`."""
        fd = open_wanted(self._layout, want.path)
        try:
            before = os.fstat(fd)
            facts = _facts(want, before)
            if want.may_pack and not want.digest_only and facts.length <= MAX_DATA_BYTES:
                self._send_at_once(fd, want, facts)
            else:
                self._send_in_pieces(fd, want, facts)
        finally:
            os.close(fd)

    def _send_in_pieces(self, fd: int, want: Want, facts: SpanFacts) -> None:
        self.await_sent()
        self._channel.send_json(FrameKind.SPAN, facts)
        digest = hashlib.sha256()
        end = facts.offset + facts.length
        for offset in range(facts.offset, end, PIECE_BYTES):
            count = min(PIECE_BYTES, end - offset)
            piece = self._buffer[HEADER_BYTES : HEADER_BYTES + count]
            read_exactly(fd, piece, offset, want.path)
            digest.update(piece)
            if not want.digest_only:
                self._buffer[:HEADER_BYTES] = encode_data_header(offset, count)
                self._channel.send(self._buffer[: HEADER_BYTES + count])
        _refuse_changed(fd, want, facts)
        self._channel.send_json(FrameKind.END, SpanEnd(digest.hexdigest()))

    def _send_at_once(self, fd: int, want: Want, facts: SpanFacts) -> None:
        """The whole span as one DATA frame, packed where that makes it smaller."""
        data = bytearray(facts.length)
        read_exactly(fd, memoryview(data), facts.offset, want.path)
        _refuse_changed(fd, want, facts)
        sha256 = hashlib.sha256(data).hexdigest()
        begun = time.monotonic()
        packed = pack_floats(data)
        packing_s = time.monotonic() - begun
        if packed is None:
            self._sending.start(lambda: self._send_span(facts, RAW_ENCODING, data, SpanEnd(sha256)))
        else:
            self._sending.start(lambda: self._send_span(facts, PACKED_ENCODING, packed, SpanEnd(sha256, packing_s)))

    def _send_span(self, facts: SpanFacts, encoding: int, body: Buffer, end: SpanEnd) -> None:
        self._channel.send_json(FrameKind.SPAN, facts)
        if body:
            self._channel.send(encode_data_header(facts.offset, len(body), encoding))
            self._channel.send(body)
        self._channel.send_json(FrameKind.END, end)


def _facts(want: Want, file: os.stat_result) -> SpanFacts:
    """What of a file with these facts answers the want. Raises `AgentError`."""
    if not stat.S_ISREG(file.st_mode):
        raise AgentError("usage", f"{want.path} is no regular file")
    if want.offset < 0 or not 0 <= want.length <= MAX_SPAN_BYTES:
        raise AgentError("usage", f"{want.length} bytes at {want.offset} cannot be sent")
    if want.offset > file.st_size:
        raise AgentError("integrity", f"{want.path} became shorter: it has {file.st_size} bytes", _FETCH_AGAIN)
    length = min(want.length, file.st_size - want.offset)
    return SpanFacts(file.st_size, file.st_mtime_ns, file.st_ino, want.offset, length)


def _refuse_changed(fd: int, want: Want, facts: SpanFacts) -> None:
    after = os.fstat(fd)
    if not want.may_grow and (facts.size, facts.mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AgentError("integrity", f"{want.path} changed while it was read", _FETCH_AGAIN)


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


def read_exactly(fd: int, view: memoryview, offset: int, path: str) -> None:
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
