"""A file goes from one node to another, each behind a real sshd of its own, and never onto this machine's disk."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.connect import connect
from orchestrator.ssh.settings import RetryPolicy
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.node_copy import NodeCopy, describe
from orchestrator.transfer.node_files import DescribedFile
from orchestrator.transfer.progress import ProgressListener, TransferProgress
from orchestrator.transfer.upload import UploadResult
from tests.support.floats import bfloat16
from tests.support.sshd import Sshd, start_sshd
from tests.support.world import World, digests, make_world

CONTENT = random.Random(6).randbytes(40 * 1024 * 1024 + 5)
SOON = ReconnectPolicy(max_fruitless=8, first_wait_s=0.05, longest_wait_s=0.5)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Sshd, Sshd]]:
    pair = (start_sshd(tmp_path / "a"), start_sshd(tmp_path / "b"))
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture
def world(tmp_path: Path, servers: tuple[Sshd, Sshd]) -> World:
    small = tmp_path / "small.pt"
    small.write_bytes(CONTENT)
    made = make_world(tmp_path, servers[0], small, sys.executable)
    made.add_cluster("other", servers[1], tmp_path / "other node")
    return made


def test_the_command_copies_and_says_under_what_name_the_other_node_has_it(world: World) -> None:
    done = world.json("fetch", "lab:best.pt", "other:")
    cluster, _, path = done["checkpoint"].partition(":")
    assert cluster == "other"
    assert Path(path).read_bytes() == CONTENT
    assert world.json("fetch", "lab:best.pt", "other:")["bytes_sent"] == 0
    left = [p for p in world.home.rglob("*") if p.is_file() and p.stat().st_size > 10 * 1024 * 1024]
    assert left == []


@pytest.fixture
def nodes(tmp_path: Path, servers: tuple[Sshd, Sshd]) -> list[Node]:
    layout = LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")
    return [
        Node(
            ClusterProfile.model_validate(
                {"host": "h", "node_root": str(tmp_path / f"root {n}"), "python": {"path": sys.executable}}
            ),
            build_payload(layout),
            lambda server=server: connect(server.settings(), RetryPolicy(30.0), sockets_folder=tmp_path / "s"),  # type: ignore[misc]
        )
        for n, server in enumerate(servers)
    ]


def copy(
    source: Node,
    target: Node,
    file: Path,
    bandwidth_limit_bytes_per_s: float,
    on_progress: ProgressListener | None = None,
) -> UploadResult:
    described = describe(source, str(file))
    assert isinstance(described, DescribedFile)
    copy_files = NodeCopy(source, target, bandwidth_limit_bytes_per_s=bandwidth_limit_bytes_per_s, retry=SOON)
    with copy_files:
        return copy_files([described], described.manifest, on_progress)


def test_weights_go_packed_from_node_to_node_over_a_slow_link(tmp_path: Path, nodes: list[Node]) -> None:
    content = b"".join(bytes((n,)) * 8 + bfloat16(4 * 1024 * 1024) for n in range(3))
    source_file = tmp_path / "weights.bin"
    source_file.write_bytes(content)
    with nodes[0] as source, nodes[1] as target:
        done = copy(source, target, source_file, bandwidth_limit_bytes_per_s=8e6)
    assert Path(done.path_on_node).read_bytes() == content
    assert done.bytes_packed == len(content) - done.bytes_sent > 0


def test_a_copy_survives_the_loss_of_either_node(tmp_path: Path, servers: tuple[Sshd, Sshd], nodes: list[Node]) -> None:
    source_file = tmp_path / "source.pt"
    source_file.write_bytes(CONTENT)
    cuts = [(8, servers[0]), (16, servers[1]), (24, servers[0])]

    def cut(progress: TransferProgress) -> None:
        if cuts and progress.bytes_done >= cuts[0][0] * 1024 * 1024:
            cuts.pop(0)[1].kill_sessions()

    with nodes[0] as source, nodes[1] as target:
        done = copy(source, target, source_file, bandwidth_limit_bytes_per_s=40e6, on_progress=cut)
    assert cuts == []
    assert Path(done.path_on_node).read_bytes() == CONTENT


def test_a_folder_is_copied_whole_and_the_second_time_not_at_all(world: World) -> None:
    folder = world.node / "data" / "step 5"
    (folder / "below").mkdir(parents=True)
    (folder / "large").write_bytes(CONTENT)
    for number in range(300):
        (folder / "below" / f"part {number}").write_bytes(f"{number}".encode() * number)
    done = world.json("fetch", "lab:step 5", "other:")
    assert digests(Path(done["checkpoint"].partition(":")[2])) == digests(folder)
    assert done["bytes_sent"] == done["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert world.json("fetch", "lab:step 5", "other:")["bytes_sent"] == 0
    with (folder / "large").open("r+b") as file:
        file.write(b"changed")
    assert world.json("fetch", "lab:step 5", "other:")["bytes_sent"] == 8 * 1024 * 1024
    assert [p for p in world.home.rglob("*") if p.is_file() and p.stat().st_size > 10 * 1024 * 1024] == []
    refused = world.json("fetch", "lab:nowhere", "other:", expect=2)
    assert "nowhere" in refused["cause"]


def test_a_folder_with_what_must_not_travel_is_refused(world: World) -> None:
    folder = world.node / "data" / "step 5"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    (folder / "odd").symlink_to("/etc/passwd")
    refused = world.json("fetch", "lab:step 5", "other:", expect=2)
    assert "leads out of the folder" in refused["cause"]
