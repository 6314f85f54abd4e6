"""A checkpoint goes up and comes back over real SSH while every connection is cut ten times each way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.connect import connect
from orchestrator.ssh.settings import RetryPolicy
from orchestrator.transfer import fetch
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.fetch import fetch_file
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.messages import FileList, ListRequest
from tests.support.sshd import Sshd, start_sshd

MIB = 1024 * 1024
RECORDS = 44
CUTS = 10
SOON = ReconnectPolicy(max_fruitless=8, first_wait_s=0.05, longest_wait_s=0.2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    running = start_sshd(tmp_path / "sshd")
    yield running
    running.stop()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A zip of stored records of 1 MiB, which are chunks of their own."""
    path, noise = tmp_path / "best.pt", random.Random(9)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(RECORDS):
            archive.writestr(f"archive/data/{number}", noise.randbytes(MIB))
    return path


def cut(server: Sshd) -> None:
    """End every connection as a link does: the agents behind it see the end of their input."""
    for pid in server.session_pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                os.kill(pid, signal.SIGKILL)


def cutter(server: Sshd) -> tuple[list[int], Callable[[TransferProgress], None]]:
    """A listener that cuts all connections each time another eleventh has moved, and what it has cut so far."""
    cuts: list[int] = []

    def listen(progress: TransferProgress) -> None:
        if len(cuts) < CUTS and progress.bytes_done > (len(cuts) + 1) * progress.bytes_total / (CUTS + 1):
            cuts.append(progress.bytes_done)
            cut(server)

    return cuts, listen


def test_ten_cuts_each_way_cost_no_byte_of_the_file(
    server: Sshd, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SPAN_BYTES", MIB)
    layout = LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")
    profile = ClusterProfile.model_validate(
        {"host": "h", "node_root": str(tmp_path / "root"), "python": {"path": sys.executable}}
    )
    manifest = digest_local_file(checkpoint, layout).manifest
    assert len(manifest.chunks) > RECORDS
    connection = lambda: connect(server.settings(), RetryPolicy(30.0), sockets_folder=tmp_path / "s")  # noqa: E731
    streams, limit = StreamPolicy(fixed=2), 25e6
    with Node(profile, build_payload(layout), connection) as node:
        cuts, listen = cutter(server)
        sent = upload_file(
            node,
            checkpoint,
            manifest,
            streams=streams,
            bandwidth_limit_bytes_per_s=limit,
            on_progress=listen,
            retry=SOON,
        )
        assert len(cuts) == CUTS
        assert Path(sent.path_on_node).read_bytes() == checkpoint.read_bytes()
        listed = node.call("list_files", ListRequest(node.layout.root, sent.path_on_node), FileList)
        cuts, listen = cutter(server)
        back = fetch_file(
            node,
            listed.path,
            listed.files[0],
            tmp_path / "back.pt",
            streams=streams,
            bandwidth_limit_bytes_per_s=limit,
            on_progress=listen,
            retry=SOON,
        )
    assert len(cuts) == CUTS
    assert (tmp_path / "back.pt").read_bytes() == checkpoint.read_bytes()
    assert back.bytes_received == manifest.size, "a verified span was fetched again"
