"""The stream verb `forward`, spoken frame by frame: what it puts into another node's store, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import IntegrityError, NodeUnfitError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import FrameChannel, ReconnectPolicy, StreamDamagedError, StreamEndedError
from orchestrator.transfer.forwarded import ForwardedStream
from orchestrator.transfer.node_files import DescribedFile, NodeFiles
from orchestrator.transfer.node_lines import NodeLines
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.agent import far_chunks
from remote_payload.agent.machine import machine_id
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.chunk_table import pack_chunks
from remote_payload.wire.codec import to_json
from remote_payload.wire.forward import FAR_END_GONE_STATUS, Fill, ForwardRequest, SshLogin
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import ListedFile
from remote_payload.wire.packing import pack_floats
from remote_payload.wire.packing_rates import PackingRates
from remote_payload.wire.stream import (
    PACKED_ENCODING,
    RAW_ENCODING,
    FrameKind,
    ReceiveRequest,
    SendRequest,
    StreamCall,
)
from tests.support.agent_streams import ThreadOpener, even_cuts, make_node_root, manifest_of
from tests.support.floats import bfloat16

FLOATS = 1
"""The chunk of weights; the others do not shrink."""
CONTENT = random.Random(4).randbytes(1_000_000) + bfloat16(500_000) + random.Random(5).randbytes(1_000_000)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), 1_000_000))
LOGIN = SshLogin("far.example.org", "someone", 22, 5.0)


@pytest.fixture
def near(tmp_path: Path) -> ThreadOpener:
    (tmp_path / "near").mkdir()
    (tmp_path / "file").write_bytes(CONTENT)
    return ThreadOpener(make_node_root(tmp_path / "near"))


@pytest.fixture
def far(tmp_path: Path) -> NodeLayout:
    (tmp_path / "far").mkdir()
    return NodeLayout(str(make_node_root(tmp_path / "far")))


@pytest.fixture
def logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an `ssh` that logs in to this machine, whatever it is told, notes its process and its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    noted = tmp_path / "logins"
    ssh = folder / "ssh"
    lines = (
        "#!/bin/sh",
        '[ "$1" != -G ] || exit 1',
        f'echo "$$ $*" >> {shlex.quote(str(noted))}',
        "for command; do :; done",
        'exec /bin/sh -c "$command"',
    )
    ssh.write_text("\n".join(lines) + "\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return noted


def receive_call(far: NodeLayout) -> StreamCall:
    request = ReceiveRequest(far.root, MANIFEST.digest, len(CONTENT), len(MANIFEST.chunks), secrets.token_hex(16))
    return StreamCall("receive", to_json(request))


def forward_request(
    near: ThreadOpener, far: NodeLayout, machine: str | None = None, call: StreamCall | None = None, **changes: Any
) -> ForwardRequest:
    nonce = secrets.token_hex(16)
    message = {"nonce": nonce, "protocol": PROTOCOL_VERSION, **to_json(call or receive_call(far))}
    text = frames.encode_request({**message, "machine_id": machine or machine_id()})
    project = Path(__file__).parents[2]
    words = ["env", f"PYTHONPATH={project}", sys.executable, "-m", "remote_payload", "agent", "stream", text]
    script = f"{shlex.join(words)}\nexit $?\n"
    request = ForwardRequest(near.layout.root, LOGIN, "/bin/sh", f"{{ {script} }}\n", nonce, 20.0)
    return dataclasses.replace(request, **changes)


class Clock:
    """Moves by `step_s` each time that somebody looks at it: handing over a piece seems to take so long."""

    def __init__(self) -> None:
        self.step_s = 1e-6
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += self.step_s
        return self._now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the first node measures its link to the other one, which seems to be a fast one."""
    made = Clock()
    monkeypatch.setattr(far_chunks, "PackingRates", lambda: PackingRates(made))
    return made


@pytest.fixture
def forwarded(near: ThreadOpener, far: NodeLayout, logins: Path, clock: Clock) -> Iterator[ByteStream]:
    """A stream on which the other agent has said what it has: nothing."""
    with near.open_agent_stream("forward", forward_request(near, far), idle_timeout_s=20) as stream:
        channel = FrameChannel(stream)
        channel.receive(FrameKind.FORWARDING)
        channel.send(FrameKind.MANIFEST, 0, pack_chunks(MANIFEST.chunks))
        channel.receive(FrameKind.HAVE)
        yield stream


def fill_of(path: Path, offset: int, length: int) -> Fill:
    facts = path.stat()
    return Fill(str(path), offset, length, facts.st_size, facts.st_mtime_ns, facts.st_ino)


def send_chunk(channel: FrameChannel, path: Path, index: int, pieces: int = 1, encoding: int = RAW_ENCODING) -> None:
    chunk = MANIFEST.chunks[index]
    channel.send_data_header(index, chunk.length, encoding)
    for number in range(pieces):
        first, end = (chunk.length * n // pieces for n in (number, number + 1))
        channel.send_json(FrameKind.FILL, fill_of(path, chunk.offset + first, end - first))


def journalled(far: NodeLayout) -> set[int]:
    lines = Path(far.checkpoint_journal(MANIFEST.digest)).read_bytes().splitlines()
    return {int(line.split()[0]) for line in lines if line[:1].isdigit() and line.endswith(b".")}


def until_gone(logins: Path) -> None:
    pid = int(logins.read_text().split()[0])
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the login does not end"
        time.sleep(0.02)


def test_chunks_come_from_the_disk_of_the_node_and_the_other_one_finishes_the_file(
    tmp_path: Path, forwarded: ByteStream, far: NodeLayout, logins: Path
) -> None:
    channel = FrameChannel(forwarded)
    for index in (2, 0, 1):
        send_chunk(channel, tmp_path / "file", index, pieces=index + 1)
        assert channel.receive(FrameKind.ACK)[0].argument == index
    channel.send(FrameKind.FINISH)
    channel.receive(FrameKind.FINISHED)
    forwarded.close_write()
    assert forwarded.finish(20).exit_status == 0
    assert Path(far.checkpoint(MANIFEST.digest)).read_bytes() == CONTENT
    until_gone(logins)


def bytes_saved(channel: FrameChannel, index: int) -> int:
    """What the nodes say of a chunk that has arrived: how much packing took off it."""
    header, _ = channel.receive(FrameKind.PACKED, FrameKind.ACK)
    saved = 0
    if header.kind is FrameKind.PACKED:
        saved = header.argument
        header, _ = channel.receive(FrameKind.ACK)
    assert header.argument == index
    return saved


@pytest.mark.parametrize(
    ("piece_s", "index", "encoding", "is_packed"),
    [
        (1.0, FLOATS, PACKED_ENCODING, True),
        (1.0, FLOATS, RAW_ENCODING, False),
        (1.0, 0, PACKED_ENCODING, False),
        (1e-6, FLOATS, PACKED_ENCODING, False),
    ],
)
def test_floats_that_may_go_packed_do_where_the_link_between_the_nodes_is_slow(
    tmp_path: Path, clock: Clock, forwarded: ByteStream, piece_s: float, index: int, encoding: int, is_packed: bool
) -> None:
    clock.step_s = piece_s
    channel = FrameChannel(forwarded)
    send_chunk(channel, tmp_path / "file", 2, encoding=PACKED_ENCODING)
    assert bytes_saved(channel, 2) == 0  # nothing is known of the link yet
    send_chunk(channel, tmp_path / "file", index, pieces=3, encoding=encoding)
    saved = bytes_saved(channel, index)
    assert saved > 0.2 * MANIFEST.chunks[index].length if is_packed else saved == 0


def test_a_frame_that_follows_a_packed_chunk_does_not_overtake_it(
    tmp_path: Path, clock: Clock, forwarded: ByteStream, far: NodeLayout
) -> None:
    clock.step_s = 1.0
    channel = FrameChannel(forwarded)
    for index, encoding in ((2, RAW_ENCODING), (0, RAW_ENCODING), (FLOATS, PACKED_ENCODING)):
        send_chunk(channel, tmp_path / "file", index, encoding=encoding)
    channel.send(FrameKind.FINISH)
    assert [bytes_saved(channel, index) > 0 for index in (2, 0, FLOATS)] == [False, False, True]
    channel.receive(FrameKind.FINISHED)
    assert Path(far.checkpoint(MANIFEST.digest)).read_bytes() == CONTENT


def test_while_a_chunk_is_being_packed_others_go_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, forwarded: ByteStream
) -> None:
    others_are_there = threading.Event()

    def packed_late(data: bytearray) -> bytes | None:
        assert others_are_there.wait(20)
        return pack_floats(data)

    monkeypatch.setattr(far_chunks, "pack_floats", packed_late)
    clock.step_s = 1.0
    channel = FrameChannel(forwarded)
    send_chunk(channel, tmp_path / "file", 2)
    assert bytes_saved(channel, 2) == 0
    for index in (FLOATS, 0):
        send_chunk(channel, tmp_path / "file", index, encoding=PACKED_ENCODING)
    assert bytes_saved(channel, 0) == 0
    others_are_there.set()
    assert bytes_saved(channel, FLOATS) > 0


class ForwardingOpener(ThreadOpener):
    """Opens every stream by way of another node."""

    def __init__(self, near: ThreadOpener, far: NodeLayout) -> None:
        super().__init__(Path(far.root))
        self.near = near

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        call = StreamCall(verb, to_json(request))
        stream = self.near.open_agent_stream("forward", forward_request(self.near, self.layout, call=call))
        FrameChannel(stream).receive(FrameKind.FORWARDING)
        return ForwardedStream(stream, self, may_pack=True)

    def ended(self) -> None:
        return

    def far_end_was_lost(self, why: str) -> None:
        raise AssertionError(why)

    def connection_was_lost(self) -> None:
        raise AssertionError


def copy(near: ThreadOpener, far: NodeLayout, path: Path, rates: PackingRates, **changes: Any) -> UploadResult:
    facts = path.stat()
    listed = ListedFile("file", facts.st_size, facts.st_mtime_ns, facts.st_ino)
    lines = NodeLines(near, ReconnectPolicy(), lambda: 0)
    files = NodeFiles(lines, [DescribedFile(str(path), listed, MANIFEST)], rates, packing=True)
    done = upload_file(ForwardingOpener(near, far), files, MANIFEST, packing=False, rates=rates, **changes)
    assert Path(far.checkpoint(MANIFEST.digest)).read_bytes() == CONTENT
    return done


def test_what_goes_from_node_to_node_tells_nothing_of_the_link_from_here(
    tmp_path: Path, near: ThreadOpener, far: NodeLayout, logins: Path
) -> None:
    rates = PackingRates(itertools.count().__next__)
    copy(near, far, tmp_path / "file", rates)
    assert not rates.knows_link


@pytest.mark.parametrize(("limit", "is_packed"), [(100e6, True), (3.9e6, False)])
def test_a_chunk_that_a_limit_lets_go_in_pieces_only_goes_as_it_is(
    tmp_path: Path, near: ThreadOpener, far: NodeLayout, logins: Path, clock: Clock, limit: float, is_packed: bool
) -> None:
    """The other node hears nothing while the first one waits for a whole chunk."""
    clock.step_s = 1.0
    limits: dict[str, Any] = {"order": [2, FLOATS, 0], "bandwidth_limit_bytes_per_s": limit}
    done = copy(near, far, tmp_path / "file", PackingRates(), streams=StreamPolicy(fixed=1), **limits)
    assert (done.bytes_packed > 0) == is_packed
    assert done.bytes_sent + done.bytes_packed == len(CONTENT)


def test_a_chunk_that_the_node_packed_wrongly_is_sent_again_as_it_is(
    tmp_path: Path, near: ThreadOpener, far: NodeLayout, logins: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    packed: list[int] = []

    def packed_wrongly(data: bytearray) -> bytes | None:
        body = pack_floats(data)
        packed.append(len(body or data))
        return body and body[:-1] + bytes((body[-1] ^ 1,))

    clock.step_s = 1.0
    monkeypatch.setattr(far_chunks, "pack_floats", packed_wrongly)
    order = [2, FLOATS, 0]
    done = copy(near, far, tmp_path / "file", PackingRates(), order=order, streams=StreamPolicy(fixed=1))
    spared = 1_000_000 - packed[0]
    assert (done.bytes_sent, done.bytes_packed) == (len(CONTENT) + 1_000_000 - spared, spared)


@pytest.mark.parametrize(
    "login",
    [
        SshLogin("-oProxyCommand=touch made", "someone", 22, 5.0),
        SshLogin("host -oProxyCommand=touch", "someone", 22, 5.0),
        SshLogin("someone@host", "someone", 22, 5.0),
        SshLogin("ssh://host", "someone", 22, 5.0),
        SshLogin("", "someone", 22, 5.0),
        SshLogin("host\n", "someone", 22, 5.0),
        SshLogin("host", "-oProxyCommand=touch", 22, 5.0),
        SshLogin("host", "a;b", 22, 5.0),
        SshLogin("host", "$(touch made)", 22, 5.0),
        SshLogin("host", "someone", 0, 5.0),
        SshLogin("host", "someone", 70000, 5.0),
        SshLogin("host", "someone", 22, -1.0),
    ],
)
def test_what_could_be_taken_for_an_option_or_another_address_starts_nothing(
    near: ThreadOpener, far: NodeLayout, logins: Path, login: SshLogin
) -> None:
    stream = near.open_agent_stream("forward", forward_request(near, far, login=login), idle_timeout_s=20)
    with stream, pytest.raises(UsageError):
        FrameChannel(stream).receive(FrameKind.FORWARDING)
    assert not logins.exists()


def test_the_host_stands_behind_all_options(near: ThreadOpener, far: NodeLayout, logins: Path) -> None:
    with near.open_agent_stream("forward", forward_request(near, far), idle_timeout_s=20) as stream:
        FrameChannel(stream).receive(FrameKind.FORWARDING)
    words = logins.read_text().split()
    assert words[-7:] == ["-l", "someone", "-p", "22", "--", "far.example.org", "/bin/sh"]


def test_an_agent_on_another_machine_takes_nothing(near: ThreadOpener, far: NodeLayout, logins: Path) -> None:
    request = forward_request(near, far, machine="0" * 32)
    stream = near.open_agent_stream("forward", request, idle_timeout_s=20)
    with stream, pytest.raises(NodeUnfitError, match="another machine"):
        FrameChannel(stream).receive(FrameKind.FORWARDING)
    assert not Path(far.checkpoints).exists()
    until_gone(logins)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo a banner\nexit 3\n", "nothing came"),
        ("printf '\\n=remote-eval=%s=payload-missing=\\n' {nonce}\n", "payload-missing"),
        ("printf 'no luck\\r\\n' >&2\nexit 255\n", "no luck"),
    ],
)
def test_an_agent_that_does_not_start_is_said_in_a_line(
    near: ThreadOpener, far: NodeLayout, logins: Path, script: str, said: str
) -> None:
    request = forward_request(near, far)
    request = dataclasses.replace(request, script=script.replace("{nonce}", request.nonce))
    stream = near.open_agent_stream("forward", request, idle_timeout_s=20)
    with stream, pytest.raises(NodeUnfitError) as caught:
        FrameChannel(stream).receive(FrameKind.FORWARDING)
    assert said in caught.value.cause
    assert "\\x" not in caught.value.cause  # as an unprintable character is shown
    until_gone(logins)


@pytest.mark.parametrize("encoding", [RAW_ENCODING, PACKED_ENCODING])
def test_a_file_that_is_another_than_was_described_is_refused_and_what_went_before_is_kept(
    tmp_path: Path, forwarded: ByteStream, far: NodeLayout, clock: Clock, encoding: int
) -> None:
    clock.step_s = 1.0
    channel = FrameChannel(forwarded)
    send_chunk(channel, tmp_path / "file", 0)
    channel.receive(FrameKind.ACK)
    fill = fill_of(tmp_path / "file", 1_000_000, 1_000_000)
    (tmp_path / "file").write_bytes(CONTENT + b"more")
    channel.send_data_header(1, 1_000_000, encoding)
    channel.send_json(FrameKind.FILL, fill)
    with pytest.raises(IntegrityError, match="changed while it was copied"):
        channel.receive(FrameKind.ACK)
    assert journalled(far) == {0}


def test_bytes_that_are_not_what_the_table_says_are_refused_by_the_other_node(
    tmp_path: Path, forwarded: ByteStream
) -> None:
    channel = FrameChannel(forwarded)
    channel.send_data_header(0, 1_000_000)
    channel.send_json(FrameKind.FILL, fill_of(tmp_path / "file", 1_000_000, 1_000_000))
    assert channel.receive(FrameKind.REFUSED)[0].argument == 0


def test_a_link_below_the_node_root_is_not_followed(tmp_path: Path, near: ThreadOpener, forwarded: ByteStream) -> None:
    link = Path(near.layout.root) / "link"
    link.symlink_to(tmp_path / "file")
    channel = FrameChannel(forwarded)
    channel.send_data_header(0, 1_000_000)
    channel.send_json(FrameKind.FILL, fill_of(link, 0, 1_000_000))
    with pytest.raises(IntegrityError, match="symbolic link"):
        channel.receive(FrameKind.ACK)


@pytest.mark.parametrize("length", [0, 1_000_001])
def test_a_fill_of_a_wrong_length_ends_the_stream(tmp_path: Path, forwarded: ByteStream, length: int) -> None:
    channel = FrameChannel(forwarded)
    channel.send_data_header(0, 1_000_000)
    channel.send_json(FrameKind.FILL, fill_of(tmp_path / "file", 0, length))
    with pytest.raises(StreamDamagedError):
        channel.receive(FrameKind.ACK)


def test_another_frame_amid_a_chunk_ends_the_stream(forwarded: ByteStream) -> None:
    channel = FrameChannel(forwarded)
    channel.send_data_header(0, 1_000_000)
    channel.send(FrameKind.FINISH)
    with pytest.raises(StreamDamagedError):
        channel.receive(FrameKind.ACK)


def test_a_login_that_dies_in_the_middle_ends_the_stream_with_its_own_status(
    forwarded: ByteStream, logins: Path
) -> None:
    os.killpg(int(logins.read_text().split()[0]), signal.SIGKILL)
    with pytest.raises(StreamEndedError):
        FrameChannel(forwarded).receive(FrameKind.ACK)
    assert forwarded.finish(20).exit_status == FAR_END_GONE_STATUS
    assert "forward" not in {thread.name for thread in threading.enumerate()}


def test_when_the_client_goes_the_other_agent_journals_what_came_and_the_login_ends(
    tmp_path: Path, forwarded: ByteStream, far: NodeLayout, logins: Path
) -> None:
    channel = FrameChannel(forwarded)
    send_chunk(channel, tmp_path / "file", 1)
    channel.receive(FrameKind.ACK)
    forwarded.close()
    until_gone(logins)
    assert journalled(far) == {1}


def test_the_other_verbs_do_not_take_its_frames(near: ThreadOpener) -> None:
    with near.open_agent_stream("send", SendRequest(near.layout.root), idle_timeout_s=20) as stream:
        channel = FrameChannel(stream)
        channel.send(FrameKind.FILL)
        with pytest.raises(StreamDamagedError):
            channel.receive(FrameKind.SPAN)
