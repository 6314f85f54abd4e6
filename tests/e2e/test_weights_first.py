"""What of a checkpoint is sent when, and for whom, over a real sshd."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.journal import Journal
from orchestrator.pipeline.early import EARLY_START_BYTES
from orchestrator.transfer.order import ChunkClass
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.layout import NodeLayout
from tests.support.image_project import ship_image_adapter, write_config
from tests.support.relay import Relay, relay_to
from tests.support.sshd import running_sshd
from tests.support.trained import chunks_of, write_trained
from tests.support.world import World, digests, until

RECONSTRUCT = ("--checkpoint", "trained.pt", "--config", "eval.yaml", "--jobs", "reconstruct", "--num-samples", "2")
BOTH = ("--config", "eval.yaml", "--jobs", "health,reconstruct", "--num-samples", "2")
HEALTH = ("--checkpoint", "trained.pt", "--config", "eval.yaml", "--jobs", "health")
LAUNCHED = 9
"""The number of the journal's entry that says so, in a run that begins with the weights."""
SLOW_MBPS = 1.0
"""Fast enough to wait for, slow enough to be killed in the middle."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A trained checkpoint, of which each test has a copy: to train it takes longer."""

    path: Path
    width: int
    manifest: ChunkManifest
    classes: list[ChunkClass]


WrittenOfWidth = Callable[[int], Written]


class Trained:
    """A project, and a trained checkpoint in it, or on the cluster `elsewhere` whose folder is given; and where that is
    on the run's node."""

    def __init__(self, world: World, written: Written, elsewhere: Path | None = None) -> None:
        ship_image_adapter(world)
        write_config(world, written.width)
        self.local = (world.project if elsewhere is None else elsewhere / "data") / "trained.pt"
        self.given = ("--checkpoint", "trained.pt" if elsewhere is None else "elsewhere:trained.pt")
        shutil.copyfile(written.path, self.local)
        world.edit_profile(pack_floats=False)
        manifest, self.classes = written.manifest, written.classes
        layout = NodeLayout(str(world.node / "root of ours"))
        self.journal = Path(layout.checkpoint_journal(manifest.digest))
        self.stored = Path(layout.checkpoint(manifest.digest))
        self.part = Path(layout.checkpoint_part(manifest.digest))
        self.lengths = [chunk.length for chunk in manifest.chunks]
        self.rest_bytes = sum(n for n, k in zip(self.lengths, self.classes, strict=True) if k is ChunkClass.REST)
        self.needed_bytes = manifest.size - self.rest_bytes

    def journalled(self) -> set[int]:
        lines = self.journal.read_text().splitlines()[1:] if self.journal.exists() else []
        return {int(line.split()[0]) for line in lines if line.endswith(".")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenOfWidth:
    """Each is written once."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.cache
    def of_width(width: int) -> Written:
        path = folder / f"{width}.pt"
        write_trained(path, width)
        return Written(path, width, *chunks_of(path))

    return of_width


@pytest.fixture
def trained(world: World, written: WrittenOfWidth) -> Trained:
    return Trained(world, written(48))


@pytest.fixture(params=["sent from here", "copied from another node"])
def large(world: World, written: WrittenOfWidth, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trained]:
    """The rest is more than what an attempt begins without, and not much more."""
    if request.param == "sent from here":
        yield make_large(world, written(376))
        return
    with running_sshd(tmp_path / "other-sshd") as sshd:
        world.add_cluster("elsewhere", sshd, tmp_path / "elsewhere")
        yield make_large(world, written(376), tmp_path / "elsewhere")


def make_large(world: World, written: Written, elsewhere: Path | None = None) -> Trained:
    trained = Trained(world, written, elsewhere)
    assert trained.rest_bytes > EARLY_START_BYTES
    # Long enough in its place that its digest is remembered, as any checkpoint is that took minutes to write.
    os.utime(trained.local, (1, 1))
    # With a file of its size there no draft takes all of it along before preflight is over.
    with (world.node / "data" / "as large.pt").open("wb") as other:
        other.truncate(trained.local.stat().st_size)
    return trained


@pytest.fixture
def relay(world: World) -> Iterator[Relay]:
    """Between the client and the node. Over one stream, which such a limit leaves, chunks arrive in their order."""
    with relay_to(world.sshd.port) as relay:
        known = world.home / "known_hosts"
        known.write_text(world.sshd.known_hosts.read_text().replace(str(world.sshd.port), str(relay.port)))
        world.edit_profile(port=relay.port, known_hosts_file=str(known), bandwidth_limit_mbps=64)
        yield relay


def provenance(world: World, run_id: str) -> Any:
    return json.loads((world.run_folder(run_id) / "provenance.json").read_text())


def evaluate(world: World, *arguments: str) -> str:
    """The run's id; a verdict of fail is an end like another."""
    done = world.cli(*arguments, "--json")
    assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
    return str(json.loads(done.stdout)["run_id"])


def artifacts(world: World, run_id: str) -> dict[str, str]:
    return digests(world.run_folder(run_id) / "artifacts" / "reconstruct")


def kinds_of(world: World, run_id: str) -> list[str]:
    return [entry.kind for entry in Journal(world.home / "data" / "remote-eval.sqlite3").entries(run_id)]


def test_an_upload_that_is_killed_has_brought_header_and_weights_before_anything_else(
    world: World, trained: Trained
) -> None:
    world.edit_profile(bandwidth_limit_mbps=SLOW_MBPS)
    client = world.start("--checkpoint", "trained.pt", "--jobs", "count")
    until(trained.journalled)
    client.send_signal(signal.SIGKILL)
    client.communicate(timeout=60)
    here = trained.journalled()
    order = sorted(range(len(trained.classes)), key=lambda index: (trained.classes[index], index))
    assert here == set(order[: len(here)])
    assert trained.classes[order[0]] is ChunkClass.HEADER
    assert order != sorted(order)


def test_reconstruct_alone_moves_the_weights_and_health_later_the_rest_alone(world: World, trained: Trained) -> None:
    whole = world.node / "data" / "whole.pt"
    whole.write_bytes(trained.local.read_bytes())
    in_full = evaluate(world, *(("--checkpoint", "lab:whole.pt", *RECONSTRUCT[2:])))
    whole.unlink()
    assert trained.needed_bytes < 0.4 * trained.local.stat().st_size
    done = world.cli(*RECONSTRUCT)
    assert done.returncode in (0, 1), done.stderr
    assert "only the weights are sent (" in done.stdout + done.stderr
    first = world.run_ids()[-1]
    sent = provenance(world, first)
    assert (sent["bytes_sent"], sent["checkpoint"]["is_complete"]) == (trained.needed_bytes, False)
    assert sent["content_key_is_exact"] is True
    assert artifacts(world, first) == artifacts(world, in_full)
    assert not trained.stored.exists()
    health = evaluate(world, *HEALTH)
    sent = provenance(world, health)
    assert (sent["bytes_sent"], sent["checkpoint"]["is_complete"]) == (trained.rest_bytes, True)
    assert trained.stored.read_bytes() == trained.local.read_bytes()
    assert not trained.part.exists()
    results = json.loads((world.run_folder(health) / "results.json").read_text())
    assert results["verdict"]["dimensions"]["integrity"] == "pass"


@pytest.mark.parametrize("jobs", ["reconstruct,health", "reconstruct,count"])
def test_any_other_job_gets_the_whole_file(world: World, trained: Trained, jobs: str) -> None:
    run_id = evaluate(world, *RECONSTRUCT[:4], "--jobs", jobs)
    assert provenance(world, run_id)["checkpoint"]["is_complete"] is True
    assert trained.stored.read_bytes() == trained.local.read_bytes()


def test_clients_that_are_killed_while_either_share_is_sent_go_on_where_they_were(
    world: World, trained: Trained
) -> None:
    for arguments, is_under_way in (
        (RECONSTRUCT, lambda: trained.journalled()),
        (HEALTH, lambda: any(trained.classes[index] is ChunkClass.REST for index in trained.journalled())),
    ):
        world.edit_profile(bandwidth_limit_mbps=SLOW_MBPS)
        client = world.start(*arguments)
        until(is_under_way)
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=60)
        assert not trained.stored.exists()
        left = trained.local.stat().st_size - sum(trained.lengths[index] for index in trained.journalled())
        run_id = world.run_ids()[-1]
        done = world.cli("resume", run_id, "--bandwidth-limit", "1000", "--json")
        assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
        assert provenance(world, run_id)["bytes_sent"] <= left
    assert trained.stored.read_bytes() == trained.local.read_bytes()


@pytest.mark.parametrize(("when", "number"), [("before", 6), ("after", 6), ("after", 8)])
def test_a_client_killed_beside_the_entry_of_a_part_resumes_to_the_same_artifacts(
    world: World, trained: Trained, when: str, number: int
) -> None:
    run_id = world.killed_at(when, number, *RECONSTRUCT)
    assert kinds_of(world, run_id)[5:6] == ([] if when == "before" else ["synced_partly"])
    if number == 6:
        # Another client may have completed the file, or gc taken the part: until the launch nothing is relied on.
        trained.part.unlink()
    done = world.cli("resume", run_id, "--json")
    assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
    assert "mse" in (world.run_folder(run_id) / "results.json").read_text()
    assert kinds_of(world, run_id).count("launched") == 1


def test_a_run_of_the_whole_file_beside_one_of_the_weights_disturbs_neither(world: World, trained: Trained) -> None:
    world.edit_profile(bandwidth_limit_mbps=20)
    clients = [world.start(*RECONSTRUCT), world.start(*HEALTH)]
    for client in clients:
        output, _ = client.communicate(timeout=120)
        assert client.returncode in (0, 1), output
    sent = [provenance(world, run_id)["bytes_sent"] for run_id in world.run_ids()]
    assert sum(sent) == trained.local.stat().st_size
    assert trained.stored.read_bytes() == trained.local.read_bytes()


def test_reconstruct_begins_with_the_weights_and_health_ends_with_the_whole_file(world: World, large: Trained) -> None:
    done = world.cli(*large.given, *BOTH)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert "reconstruct begins, and the rest follows" in done.stdout + done.stderr
    (run_id,) = world.run_ids()
    kinds = kinds_of(world, run_id)
    assert kinds.index("synced_partly") < kinds.index("launched") < kinds.index("synced") < kinds.index("terminal")
    assert large.stored.read_bytes() == large.local.read_bytes()
    sent = provenance(world, run_id)
    assert (sent["bytes_sent"], sent["checkpoint"]["is_complete"]) == (large.local.stat().st_size, True)
    results = json.loads((world.run_folder(run_id) / "results.json").read_text())
    assert results["verdict"]["dimensions"]["integrity"] == "pass"
    assert "mse" in {metric["id"] for metric in results["metrics"]}


def test_a_client_killed_before_the_rest_went_is_waited_for_and_sends_it_when_it_comes_back(
    world: World, large: Trained
) -> None:
    run_id = world.killed_at("after", LAUNCHED, *large.given, *BOTH)
    assert kinds_of(world, run_id)[-1] == "launched"

    def jobs() -> Any:
        return world.json("status", run_id)["node"]["status"]["jobs"]

    until(lambda: "waiting for the rest" in jobs()["health"]["message"])
    assert jobs()["reconstruct"]["state"] == "succeeded"
    assert not large.stored.exists()
    done = world.cli("resume", run_id, "--json")
    assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
    assert large.stored.read_bytes() == large.local.read_bytes()
    kinds = kinds_of(world, run_id)
    assert (kinds.count("launched"), kinds.count("synced")) == (1, 1)
    results = json.loads((world.run_folder(run_id) / "results.json").read_text())
    assert results["verdict"]["dimensions"]["integrity"] == "pass"


def test_a_file_that_changed_after_its_weights_went_is_no_rest_of_them(world: World, large: Trained) -> None:
    run_id = world.killed_at("after", LAUNCHED, *large.given, *BOTH)
    with large.local.open("r+b") as file:
        file.seek(large.local.stat().st_size // 4)
        file.write(b"another optimizer")
    error = world.json("resume", run_id, expect=7)
    assert "changed after its weights were sent" in error["cause"]
    assert not large.stored.exists()
    assert world.json("cancel", run_id)["state"] == "cancelled"


def test_a_run_that_is_left_alone_begins_with_the_whole_file(world: World, large: Trained) -> None:
    run_id = world.json(*large.given, *BOTH, "--detach")["run_id"]
    assert "synced_partly" not in kinds_of(world, run_id)
    assert large.stored.exists()
    world.json("cancel", run_id)


def node_messages(world: World) -> list[str]:
    """What the only attempt's jobs have told so far."""
    lines = [line for path in world.node.rglob("events.jsonl") for line in path.read_text().splitlines(keepends=True)]
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event["message"] for event in events if event["event"] == "progress"]


def is_waiting_and_has_examined_megabytes(world: World) -> bool:
    return any(re.search(r"waiting for the rest .* \d+(\.\d+)? MB examined", told) for told in node_messages(world))


@pytest.mark.parametrize("jobs", ["health", "health,reconstruct"])
def test_health_examines_what_has_arrived_while_the_rest_travels_and_says_the_same_as_of_the_file(
    world: World, large: Trained, relay: Relay, jobs: str
) -> None:
    # What is examined while nothing arrives was there before the last byte. The job has begun before any of the rest.
    relay.hold_after(large.needed_bytes + large.rest_bytes * 3 // 4)
    client = world.start(*large.given, *BOTH[:2], "--jobs", jobs, "--num-samples", "2")
    until(lambda: is_waiting_and_has_examined_megabytes(world), limit_s=120)
    until(lambda: relay.is_holding, limit_s=120)
    assert not large.stored.exists()
    relay.mend()
    output, _ = client.communicate(timeout=100)
    assert client.returncode in (0, 1), output
    (run_id,) = world.run_ids()
    assert large.stored.read_bytes() == large.local.read_bytes()
    assert provenance(world, run_id)["bytes_sent"] == large.local.stat().st_size
    again = evaluate(world, *large.given, *HEALTH[2:])
    first, second = (world.run_folder(r) / "artifacts" / "health" / "health.json" for r in (run_id, again))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text())["verdict"]["dimensions"]["integrity"] == "pass"


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_attempt_is_seen_while_the_rest_goes_and_one_that_is_cancelled_ends_the_sending(
    world: World, large: Trained, form: tuple[str, ...]
) -> None:
    world.edit_profile(bandwidth_limit_mbps=10)
    client = world.start(*large.given, *HEALTH[2:], *form)
    seen = '"job": "health", "phase": "run", "state": "running"' if form else "health: running, run"
    assert client.stdout is not None
    shown = ""
    while seen not in shown:
        line = client.stdout.readline()
        assert line, shown
        shown += line
    assert not large.stored.exists()
    (run_id,) = world.run_ids()
    assert world.json("cancel", run_id)["state"] == "cancelled"
    output, _ = client.communicate(timeout=60)
    assert client.returncode == 6, shown + output
    assert not large.stored.exists()
    assert "synced" not in kinds_of(world, run_id)
    done = world.cli("resume", run_id, "--retry", "--bandwidth-limit", "1000", "--json")
    assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
    assert large.stored.read_bytes() == large.local.read_bytes()
