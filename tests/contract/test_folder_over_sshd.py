"""A folder of large files over real SSH: its streams log in once, serve file after file, and end with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.transport import ByteStream, Transport
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.folder import FolderFile, FolderProgress, SentFolder, send_folder
from orchestrator.transfer.local_folder import LocalFolder
from orchestrator.transfer.progress import ProgressListener, TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult, upload_file
from remote_payload.wire.chunks import ChunkManifest
from tests.support.sshd import Sshd, running_sshd
from tests.support.world import digests, until

MIB = 1024 * 1024
FILES = 6
STREAMS = 3
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)


class CountingNode(Node):
    """Counts the agents of streams that were started."""

    started = 0

    def _start_stream(self, verb: str, request: object, idle_timeout_s: float, is_bulk: bool) -> ByteStream:
        self.started += 1
        return super()._start_stream(verb, request, idle_timeout_s, is_bulk)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    with running_sshd(tmp_path / "server") as found:
        yield found


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


@pytest.fixture
def node(
    tmp_path: Path, layout: LocalLayout, server: Sshd, connect_to: Callable[..., Transport]
) -> Iterator[CountingNode]:
    profile = ClusterProfile.model_validate(
        {"host": "127.0.0.1", "node_root": str(tmp_path / "node root"), "python": {"path": sys.executable}}
    )
    with CountingNode(profile, build_payload(layout), lambda: connect_to(server.settings())) as made:
        _ = made.hello  # installs the payload
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step 5"
    path.mkdir()
    for number in range(FILES):
        (path / f"model-{number}.safetensors").write_bytes(random.Random(number).randbytes(9 * MIB))
    (path / "config.json").write_text("{}")
    return path


def logins(server: Sshd) -> int:
    return server.log.count("Accepted publickey")


def agents(tmp_path: Path) -> list[int]:
    """The processes of agents that carry streams."""
    command = ["ps", "-ww", "-eo", "pid=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    ours = [line for line in listed.splitlines() if "agent stream" in line and str(tmp_path) in line]
    return [int(line.split()[0]) for line in ours]


def send(
    node: Node,
    local: LocalFolder,
    between: Callable[[], None] = lambda: None,
    streams: int = STREAMS,
    on_progress: ProgressListener = lambda _: None,
) -> SentFolder:
    """`between` is called before each file but the first."""
    sent: list[UploadResult] = []

    def upload(files: Sequence[FolderFile], manifest: ChunkManifest, listener: ProgressListener) -> UploadResult:
        if sent:
            between()
        sent.append(upload_file(carrier, local.open(files), manifest, on_progress=listener))
        return sent[-1]

    policy = StreamPolicy(fixed=streams)
    with Carrier(node, streams=policy, packing=False, retry=NO_PATIENCE) as carrier:
        return send_folder(node, local.folder, carrier, upload, FolderProgress(local.size, on_progress))


def test_a_folder_takes_no_more_logins_than_streams_and_leaves_none_of_them_behind(
    node: CountingNode, server: Sshd, layout: LocalLayout, folder: Path, tmp_path: Path
) -> None:
    before = logins(server)
    sent = send(node, LocalFolder(folder, layout))
    assert digests(Path(sent.path)) == digests(folder)
    assert 1 <= node.started <= STREAMS
    assert logins(server) - before <= STREAMS
    until(lambda: not agents(tmp_path))


def test_a_stream_that_is_lost_between_two_files_is_replaced(
    node: CountingNode, layout: LocalLayout, folder: Path, tmp_path: Path
) -> None:
    lost: list[int] = []

    def lose_one() -> None:
        if not lost:
            lost.extend(agents(tmp_path))
            os.kill(lost[0], signal.SIGKILL)
            until(lambda: lost[0] not in agents(tmp_path))

    sent = send(node, LocalFolder(folder, layout), lose_one, streams=1)
    assert digests(Path(sent.path)) == digests(folder)
    assert len(lost) == 1
    assert (node.started, node.counts.logins) == (2, 1)
    until(lambda: not agents(tmp_path))


def test_a_folder_that_is_given_up_in_the_middle_leaves_no_stream_behind(
    node: CountingNode, layout: LocalLayout, folder: Path, tmp_path: Path
) -> None:
    class GivenUpError(Exception):
        pass

    def give_up(progress: TransferProgress) -> None:
        if progress.bytes_done > 20 * MIB:
            raise GivenUpError

    with pytest.raises(GivenUpError):
        send(node, LocalFolder(folder, layout), on_progress=give_up)
    until(lambda: not agents(tmp_path))
    assert digests(Path(send(node, LocalFolder(folder, layout)).path)) == digests(folder)
