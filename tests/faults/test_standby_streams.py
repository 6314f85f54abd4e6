"""A stream that is opened before it is known what for: it serves as any other, and is missed by nobody."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import ConnectionLostError, IntegrityError, UsageError
from orchestrator.ssh.transport import ByteStream
from orchestrator.standby import Standby
from orchestrator.transfer.channel import FrameChannel
from remote_payload.wire.codec import to_json
from remote_payload.wire.stream import FrameKind, SendRequest, StandbyRequest, StreamCall, Want
from tests.support.agent_streams import ThreadOpener, make_node_root

CONTENT = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def opener(tmp_path: Path) -> ThreadOpener:
    return ThreadOpener(make_node_root(tmp_path))


def stand_by(opener: ThreadOpener, wait_s: float = 20.0) -> ByteStream:
    return opener.open_agent_stream("standby", StandbyRequest(wait_s), idle_timeout_s=20)


def test_a_stand_by_stream_goes_on_as_the_verb_it_is_told(opener: ThreadOpener, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with stand_by(opener) as stream:
        channel = FrameChannel(stream)
        channel.send_json(FrameKind.PERFORM, StreamCall("send", to_json(SendRequest(opener.layout.root))))
        channel.send_json(FrameKind.WANT, Want(str(tmp_path / "file"), 0, len(CONTENT), digest_only=True))
        channel.receive(FrameKind.SPAN)
        channel.receive(FrameKind.END)


@pytest.mark.parametrize(
    "call", [StreamCall("rm -rf", {}), StreamCall("receive", None), StreamCall("standby", {"wait_s": 1})]
)
def test_a_verb_that_is_none_is_answered_with_a_failure(opener: ThreadOpener, call: StreamCall) -> None:
    with stand_by(opener) as stream:
        channel = FrameChannel(stream)
        channel.send_json(FrameKind.PERFORM, call)
        with pytest.raises(UsageError):
            channel.receive(FrameKind.HAVE)


def test_another_frame_than_the_verb_ends_the_stream(opener: ThreadOpener) -> None:
    with stand_by(opener) as stream:
        channel = FrameChannel(stream)
        channel.send(FrameKind.FINISH)
        with pytest.raises(IntegrityError):
            channel.receive(FrameKind.HAVE)


def test_an_agent_that_is_told_nothing_ends(opener: ThreadOpener) -> None:
    with stand_by(opener, wait_s=0.2) as stream:
        assert stream.read(1) == b""
        assert stream.finish(20.0).exit_status == 75


def test_a_client_that_says_that_it_is_there_keeps_its_agent_waiting(
    opener: ThreadOpener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    monkeypatch.setattr("orchestrator.standby.ALIVE_INTERVAL_S", 0.05)
    standby = Standby(lambda: stand_by(opener, wait_s=1.0))
    time.sleep(2.5)  # the agent has the time to end
    stream = standby.take(20.0)
    assert stream is not None
    with stream:
        channel = FrameChannel(stream)
        channel.send_json(FrameKind.PERFORM, StreamCall("send", to_json(SendRequest(opener.layout.root))))
        channel.send_json(FrameKind.WANT, Want(str(tmp_path / "file"), 0, len(CONTENT), digest_only=True))
        channel.receive(FrameKind.SPAN)
        channel.receive(FrameKind.END)


def test_a_stream_that_is_lost_while_it_stands_by_is_none(
    opener: ThreadOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.standby.ALIVE_INTERVAL_S", 0.05)
    stream = stand_by(opener, wait_s=0.2)
    assert stream.read(1) == b""  # the agent has ended
    lost, closed = Standby(lambda: stream), threading.Event()
    monkeypatch.setattr(stream, "close", lambda close=stream.close: closed.set() or close())
    assert closed.wait(20)
    assert lost.take(20.0) is None


def slow_to_write(stream: ByteStream, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """When a write to the stream has begun, and what it waits for."""
    has_begun, may_end, write = threading.Event(), threading.Event(), stream.write

    def wait_and_write(data: bytes) -> None:
        has_begun.set()
        assert may_end.wait(20)
        write(data)

    monkeypatch.setattr("orchestrator.standby.ALIVE_INTERVAL_S", 0.05)
    monkeypatch.setattr(stream, "write", wait_and_write)
    return has_begun, may_end


def test_whoever_wants_a_stream_whose_link_takes_nothing_any_more_does_not_wait_for_it_to_fail(
    opener: ThreadOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stand_by(opener)
    has_begun, may_end = slow_to_write(stream, monkeypatch)
    standby = Standby(lambda: stream)
    assert has_begun.wait(20)
    taken: list[ByteStream | None] = []
    taker = threading.Thread(target=lambda: taken.append(standby.take(0.1)), daemon=True)
    taker.start()
    taker.join(10)
    assert taken == [None]
    with pytest.raises(ConnectionLostError):
        stream.read(1)  # it is closed
    may_end.set()


def test_a_stream_is_not_taken_amid_a_sign_of_life(opener: ThreadOpener, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stand_by(opener)
    has_begun, may_end = slow_to_write(stream, monkeypatch)
    standby = Standby(lambda: stream)
    assert has_begun.wait(20)
    taken: list[bool] = []
    taker = threading.Thread(target=lambda: taken.append(standby.take(20.0) is stream and may_end.is_set()))
    taker.start()
    time.sleep(0.2)  # whoever would take it too early has the time to
    may_end.set()
    taker.join(20)
    assert taken == [True]
    stream.close()


def test_a_stream_that_comes_too_late_is_closed(opener: ThreadOpener) -> None:
    may_open, opened = threading.Event(), []

    def open_late() -> ByteStream:
        assert may_open.wait(20)
        opened.append(stand_by(opener))
        return opened[0]

    standby = Standby(open_late)
    standby.close()
    may_open.set()
    assert standby.take(20.0) is None
    with pytest.raises(ConnectionLostError):
        opened[0].read(1)


def test_a_stream_that_does_not_come_up_is_none() -> None:
    def refuse() -> ByteStream:
        raise ConnectionLostError("refused")

    assert Standby(refuse).take(20.0) is None


def test_a_stream_is_taken_once(opener: ThreadOpener) -> None:
    standby = Standby(lambda: stand_by(opener))
    stream = standby.take(20.0)
    assert stream is not None
    assert standby.take(20.0) is None
    standby.close()
    stream.close_write()
    assert stream.finish(20.0).exit_status == 75
    stream.close()
