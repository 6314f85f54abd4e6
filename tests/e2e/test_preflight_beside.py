"""A file begins its way while the node is still importing torch; what is refused without that sends nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli.output import ConsoleReporter
from orchestrator.errors import NodeUnfitError
from orchestrator.journal import Journal
from orchestrator.layout import LocalLayout
from orchestrator.node import BULK_BYTES
from orchestrator.pipeline.context import Services
from orchestrator.pipeline.resolve import Request, resolve
from orchestrator.pipeline.run import advance
from orchestrator.pipeline.world import make_services
from orchestrator.ssh.settings import Prompt
from orchestrator.transfer import fingerprints
from orchestrator.transfer.draft import draft_digest
from orchestrator.transfer.fingerprints import SETTLED_NS, digest_local_file
from remote_payload.wire.chunks import chunk_spans
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.results import Finding
from tests.support.asking_server import USER, Rules, asking_server
from tests.support.world import World, agents_of, until

FILE_BYTES = 2 * BULK_BYTES
SLOW_TORCH = """
import os, time
while not os.path.exists({go!r}): time.sleep(0.05)
{then}
__version__ = "2.6.0"
class version: cuda = None
class cuda:
    @staticmethod
    def is_available(): return False
"""


def layout_of(world: World) -> LocalLayout:
    return LocalLayout(world.home / "data", world.home / "config", world.home / "cache")


class SlowNode:
    """A node whose torch is imported only when `go` is there, and a checkpoint that is yet to be sent to it."""

    def __init__(self, world: World, tmp_path: Path, python: str) -> None:
        self.world = world
        self.go = tmp_path / "go"
        self.packages = tmp_path / "packages"
        (self.packages / "torch").mkdir(parents=True)
        self.torch_does("")
        wrapper = tmp_path / "slow-python"
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={self.packages} exec {python} "$@"\n')
        wrapper.chmod(0o755)
        world.edit_profile(python={"path": str(wrapper)}, pack_floats=False)
        self.local = world.project / "large.pt"
        noise = torch.randint(0, 256, (FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        torch.save({"w": noise}, self.local)
        with self.local.open("rb") as file:
            self.lengths = [length for _, length in chunk_spans(file, self.local.stat().st_size)]
        self.layout = NodeLayout(str(world.node / "root of ours"))

    def torch_does(self, what: str) -> None:
        (self.packages / "torch" / "__init__.py").write_text(SLOW_TORCH.format(go=str(self.go), then=what))

    def remember(self) -> str:
        """Have the client know the checkpoint's digest, which it is."""
        time.sleep(SETTLED_NS / 1e9)
        return digest_local_file(self.local, layout_of(self.world)).manifest.digest

    def draft_bytes(self, digest: str | None = None) -> int:
        """What of the draft, or of the part of a digest, is on the node's disk, and in its journal."""
        journal = Path(self.layout.checkpoint_journal(digest or draft_digest(self.local)))
        lines = journal.read_text().splitlines()[1:] if journal.exists() else []
        return sum(self.lengths[int(line.split()[0])] for line in lines if line.endswith("."))


@pytest.fixture
def slow(world: World, tmp_path: Path, torchless_python: str) -> SlowNode:
    return SlowNode(world, tmp_path, torchless_python)


def provenance_of(world: World, run_id: str) -> dict[str, Any]:
    return dict(json.loads((world.run_folder(run_id) / "provenance.json").read_text()))


def logins(world: World) -> int:
    return world.sshd.log.count("Accepted publickey")


RUN = ("--checkpoint", "large.pt", "--jobs", "count")


def test_a_file_goes_while_the_node_imports_torch_and_not_a_byte_twice(slow: SlowNode) -> None:
    client = slow.world.start(*RUN, "--json")
    until(lambda: slow.draft_bytes() >= BULK_BYTES)
    assert not slow.world.launches()
    slow.go.touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    (run_id,) = slow.world.run_ids()
    provenance = provenance_of(slow.world, run_id)
    assert provenance["bytes_sent"] == slow.local.stat().st_size
    stored = Path(slow.layout.checkpoint(provenance["checkpoint"]["digest"]))
    assert stored.read_bytes() == slow.local.read_bytes()
    assert slow.draft_bytes() == 0


def test_no_job_begins_without_the_rest_where_all_came_beside_preflight(slow: SlowNode) -> None:
    client = slow.world.start("--checkpoint", "large.pt", "--jobs", "health")
    until(lambda: slow.draft_bytes() == slow.local.stat().st_size)
    slow.go.touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 6, output  # this torch cannot do more than be imported
    assert "header is sent" not in output
    (run_id,) = slow.world.run_ids()
    kinds = [entry.kind for entry in Journal(slow.world.home / "data" / "remote-eval.sqlite3").entries(run_id)]
    assert kinds.index("synced") < kinds.index("launched")


def test_a_preflight_that_fails_ends_what_went_on_beside_it_and_the_next_try_takes_it_up(slow: SlowNode) -> None:
    # Its digest is remembered by then, which must not keep the next try from what went without it.
    time.sleep(SETTLED_NS / 1e9)
    slow.torch_does("raise ImportError('libcudart.so.12: cannot open')")
    slow.world.edit_profile(bandwidth_limit_mbps=20)
    client = slow.world.start(*RUN)
    until(lambda: slow.draft_bytes() > 0)
    slow.go.touch()
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 5, output
    assert "torch is installed on this node and cannot be imported" in output
    until(lambda: not agents_of(slow.world))
    there = slow.draft_bytes()
    assert 0 < there < FILE_BYTES
    slow.torch_does("")
    (run_id,) = slow.world.run_ids()
    slow.world.json("resume", run_id, "--bandwidth-limit", "8000")
    provenance = provenance_of(slow.world, run_id)
    assert provenance["bytes_sent"] <= slow.local.stat().st_size - there


def test_a_file_that_is_known_here_goes_as_a_new_one_does_to_a_node_that_lacks_it(slow: SlowNode) -> None:
    time.sleep(SETTLED_NS / 1e9)
    slow.go.touch()
    first = slow.world.json(*RUN)
    digest = provenance_of(slow.world, first["run_id"])["checkpoint"]["digest"]
    shutil.rmtree(slow.layout.checkpoint_folder(digest))
    slow.go.unlink()
    client = slow.world.start(*RUN)
    until(lambda: slow.draft_bytes(digest) >= BULK_BYTES)
    before = logins(slow.world)
    slow.go.touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert provenance_of(slow.world, slow.world.run_ids()[-1])["bytes_sent"] == slow.local.stat().st_size
    assert Path(slow.layout.checkpoint(digest)).read_bytes() == slow.local.read_bytes()
    assert logins(slow.world) == before


def test_where_a_file_that_is_known_here_is_there_as_well_no_stream_logs_in(slow: SlowNode) -> None:
    time.sleep(SETTLED_NS / 1e9)
    slow.go.touch()
    slow.world.json(*RUN)
    before = logins(slow.world)
    slow.world.json(*RUN)
    assert logins(slow.world) == before + 1


def test_of_a_file_that_is_known_here_a_preflight_that_fails_leaves_a_part_that_the_next_try_goes_on_with(
    slow: SlowNode,
) -> None:
    digest = slow.remember()
    slow.torch_does("raise ImportError('libcudart.so.12: cannot open')")
    slow.world.edit_profile(bandwidth_limit_mbps=20)
    client = slow.world.start(*RUN)
    until(lambda: slow.draft_bytes(digest) > 0)
    slow.go.touch()
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 5, output
    assert "torch is installed on this node and cannot be imported" in output
    until(lambda: not agents_of(slow.world))
    there = slow.draft_bytes(digest)
    assert 0 < there < FILE_BYTES
    slow.torch_does("")
    (run_id,) = slow.world.run_ids()
    slow.world.json("resume", run_id, "--bandwidth-limit", "8000")
    provenance = provenance_of(slow.world, run_id)
    assert provenance["bytes_sent"] <= slow.local.stat().st_size - there


def test_for_a_file_that_is_known_here_nothing_is_freed_where_preflight_fails(slow: SlowNode) -> None:
    other = slow.world.project / "other.pt"
    torch.save({"w": torch.zeros(FILE_BYTES // 4)}, other)
    slow.go.touch()
    slow.world.json("--checkpoint", "other.pt", "--jobs", "count")
    stored = sorted(Path(slow.layout.checkpoints).glob("*/file"))
    slow.go.unlink()
    digest = slow.remember()
    slow.torch_does("raise ImportError('libcudart.so.12: cannot open')")
    slow.world.edit_profile(store_limit_gb=1.5 * FILE_BYTES / 1e9)
    client = slow.world.start(*RUN)
    until(lambda: Path(slow.layout.checkpoint_part(digest)).exists())  # room is looked for next
    slow.go.touch()
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 5, output
    assert "torch is installed on this node and cannot be imported" in output
    assert stored
    assert sorted(Path(slow.layout.checkpoints).glob("*/file")) == stored


def test_another_client_gets_what_the_node_copied_beside_the_preflight_of_the_first(
    slow: SlowNode, torchless_python: str, tmp_path: Path
) -> None:
    size = slow.local.stat().st_size
    earlier = slow.world.project / "earlier.pt"
    earlier.write_bytes(slow.local.read_bytes())
    with earlier.open("r+b") as file:
        file.seek(FILE_BYTES // 2)
        file.write(bytes(100))
    slow.go.touch()
    slow.world.json("--checkpoint", "earlier.pt", "--jobs", "count")
    slow.go.unlink()
    digest = slow.remember()
    first = slow.world.start(*RUN)
    until(lambda: slow.draft_bytes(digest) == size)
    home = tmp_path / "another home"
    shutil.copytree(slow.world.home / "config", home / "config")
    profile = home / "config" / slow.world.profile.relative_to(slow.world.home / "config")
    another = dataclasses.replace(slow.world, home=home, profile=profile)
    another.edit_profile(python={"path": torchless_python})
    ended = another.json(*RUN)
    assert first.poll() is None
    assert provenance_of(another, ended["run_id"])["bytes_sent"] == 0
    slow.go.touch()
    output, _ = first.communicate(timeout=100)
    assert first.returncode == 0, output
    assert Path(slow.layout.checkpoint(digest)).read_bytes() == slow.local.read_bytes()


AGENT_IDLE_S = 4.0
SHORT_WAITS = [sys.executable, "-m", "tests.support.short_waits", str(AGENT_IDLE_S), "0.2", "--"]


def test_streams_wait_for_a_preflight_that_takes_longer_than_agents_wait_for_a_silent_client(slow: SlowNode) -> None:
    client = slow.world.start(*RUN, cli=SHORT_WAITS)
    until(lambda: slow.draft_bytes() == slow.local.stat().st_size)
    time.sleep(2 * AGENT_IDLE_S)  # the agents have the time to end
    before = logins(slow.world)
    slow.go.touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert logins(slow.world) == before


def test_a_client_whose_machine_sleeps_is_not_waited_for_and_goes_on_when_it_wakes(slow: SlowNode) -> None:
    client = slow.world.start(*RUN, cli=SHORT_WAITS)
    until(lambda: slow.draft_bytes() == slow.local.stat().st_size)
    assert agents_of(slow.world)
    client.send_signal(signal.SIGSTOP)
    until(lambda: not agents_of(slow.world))
    client.send_signal(signal.SIGCONT)
    slow.go.touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output


def test_a_client_that_is_killed_beside_preflight_leaves_no_agent(slow: SlowNode) -> None:
    client = slow.world.start(*RUN, cli=SHORT_WAITS)
    until(lambda: slow.draft_bytes() == slow.local.stat().st_size)
    assert agents_of(slow.world)
    client.kill()
    client.communicate(timeout=60)
    until(lambda: not agents_of(slow.world))


@pytest.mark.parametrize(
    ("profile", "jobs", "finding"),
    [
        ({"gpu": {"device": "cuda"}}, "count", "node.no_gpu"),
        ({}, "health", "node.torch_missing"),
    ],
)
def test_what_the_node_can_refuse_at_once_is_refused_before_a_byte_of_the_file_goes(
    slow: SlowNode, profile: dict[str, object], jobs: str, finding: str
) -> None:
    slow.world.edit_profile(**profile)
    if jobs == "health":
        shutil.rmtree(slow.packages / "torch")
    client = slow.world.start("--checkpoint", "large.pt", "--jobs", jobs)
    if jobs == "count":
        until(lambda: agents_of(slow.world))
    slow.go.touch()
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 5, output
    assert finding in output
    assert not Path(slow.layout.checkpoint_folder(draft_digest(slow.local))).exists()


def services_of(world: World, reporter: ConsoleReporter, prompt: Prompt) -> Services:
    return make_services(layout_of(world), reporter, prompt)


class UntilFound(ConsoleReporter):
    """Notes when preflight's finding was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.has_found = threading.Event()

    def finding(self, finding: Finding) -> None:
        if finding.id == "node.torch_import_fails":
            self.has_found.set()


def test_what_preflight_found_is_told_before_the_file_has_been_read(
    slow: SlowNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.torch_does("raise ImportError('libcudart.so.12: cannot open')")
    slow.go.touch()
    reporter = UntilFound()
    bytes_read: list[int] = []
    read_at = fingerprints._read_at

    def read_little_before_that(fd: int, view: memoryview, offset: int) -> int:
        if os.fstat(fd).st_size < FILE_BYTES:
            return read_at(fd, view, offset)  # the shipped code
        if sum(bytes_read) > BULK_BYTES // 2:
            assert reporter.has_found.wait(60)
        bytes_read.append(read_at(fd, view, offset))
        return bytes_read[-1]

    monkeypatch.setattr(fingerprints, "_read_at", read_little_before_that)
    monkeypatch.setattr(fingerprints, "_MAX_THREADS", 1)
    services = services_of(slow.world, reporter, lambda *_: None)
    request = Request("lab", str(slow.local), jobs=["count"], start_folder=slow.world.project)
    plan = resolve(request, services)
    with pytest.raises(NodeUnfitError, match="torch_import_fails"):
        advance(plan, services)
    assert BULK_BYTES // 2 < sum(bytes_read) < FILE_BYTES
    assert "ahead" not in [thread.name.split("_")[0] for thread in threading.enumerate()]


def test_where_the_login_asks_a_person_it_asks_once_and_all_goes_over_that_one(slow: SlowNode, tmp_path: Path) -> None:
    asked: list[str] = []

    def person(text: str, echo: bool) -> str:
        asked.append(text)
        return "123456"

    with asking_server(tmp_path / "server", Rules(code="123456")) as server:
        slow.world.edit_profile(
            user=USER, port=server.port, identity_files=["/nonexistent/key"], known_hosts_file=str(server.known_hosts)
        )
        services = services_of(slow.world, ConsoleReporter(quiet=True), person)
        request = Request("lab", str(slow.local), jobs=["count"], start_folder=slow.world.project)
        plan = resolve(request, services)
        threading.Thread(target=lambda: until(slow.draft_bytes) or slow.go.touch(), daemon=True).start()
        assert advance(plan, services) is not None
    assert len(asked) == 1


def test_while_a_job_runs_no_stream_waits_any_more(slow: SlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.pipeline.send.first_guess", lambda *_: 3)  # one finishes what the draft sent
    services = services_of(slow.world, ConsoleReporter(quiet=True), lambda *_: None)
    request = Request("lab", str(slow.local), jobs=["wait"], start_folder=slow.world.project)
    plan = resolve(request, services)
    stored, waited = Path(slow.layout.checkpoints), []

    def watch() -> None:
        until(lambda: slow.draft_bytes() == slow.local.stat().st_size and len(agents_of(slow.world)) >= 3)
        slow.go.touch()
        until(lambda: list(stored.glob("*/launches.txt")))
        with contextlib.suppress(AssertionError):
            until(lambda: not agents_of(slow.world), 20.0)
            waited.append("till none was left")
        next(stored.glob("*/launches.txt")).with_name("go").touch()

    threading.Thread(target=watch, daemon=True).start()
    assert advance(plan, services) is not None
    assert waited == ["till none was left"]
