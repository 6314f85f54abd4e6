"""A run on one node of a checkpoint that lies on another, each behind a real sshd of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.errors import ExitCode
from orchestrator.journal import Journal
from orchestrator.transfer.order import ChunkClass
from remote_payload.wire.layout import NodeLayout
from tests.support.durable import durable_bytes
from tests.support.formats import write_dcp_checkpoint
from tests.support.image_project import ship_image_adapter, write_config
from tests.support.sshd import Sshd, start_sshd
from tests.support.trained import chunks_of, write_trained
from tests.support.world import World, agents_of, digests, make_world, until

RUN = ("--cluster", "other", "--checkpoint", "lab:best.pt", "--jobs", "count")
LARGE_BYTES = 48 * 1024 * 1024


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """The folder of the second node, where the run is."""
    return tmp_path / "far node"


@pytest.fixture
def world(tmp_path: Path, far: Path, e2e_sshd: Sshd, small_checkpoint: Path, torchless_python: str) -> Iterator[World]:
    server = start_sshd(tmp_path / "far-sshd")
    made = make_world(tmp_path, e2e_sshd, small_checkpoint, torchless_python)
    made.add_cluster("other", server, far)
    yield made
    server.stop()


def edit_far(world: World, **changes: Any) -> None:
    path = world.profile.with_name("other.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def provenance(world: World, run_id: str) -> dict[str, Any]:
    found = json.loads((world.run_folder(run_id) / "provenance.json").read_text())
    return dict(found["checkpoint"])


def stored(far: Path) -> list[Path]:
    """Checkpoints in the far node's store, which keeps the user's code as well."""
    files = (far / "root of ours" / "checkpoints").glob("*/file")
    return [path for path in files if path.read_bytes()[:2] == b"PK"]


def make_large(world: World) -> bytes:
    path = world.node / "data" / "best.pt"
    torch.save({"w": torch.randn(LARGE_BYTES // 4, generator=torch.Generator().manual_seed(1))}, path)
    return path.read_bytes()


def durable(world: World, far: Path) -> int:
    return durable_bytes(far / "root of ours", [world.node / "data" / "best.pt"])


def cut_off(server: Sshd) -> None:
    """End a server and its connections, none of which is made again meanwhile."""
    server.process.send_signal(signal.SIGSTOP)
    server.kill_sessions()
    server.stop()


def test_the_checkpoint_is_copied_once_and_keeps_its_name(world: World, far: Path) -> None:
    world.with_torch()
    edit_far(world, python=yaml.safe_load(world.profile.read_text())["python"])
    run = ("--cluster", "other", "--checkpoint", "lab:best.pt", "--jobs", "health")
    result = world.json(*run)
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    original = (world.node / "data" / "best.pt").read_bytes()
    assert [path.read_bytes() for path in stored(far)] == [original]
    first = provenance(world, result["run_id"])
    assert (first["how"], first["reference"], first["bytes_sent"]) == ("copied", "lab:best.pt", len(original))
    assert first["source_path"] == str(world.node / "data" / "best.pt")
    again = provenance(world, world.json(*run)["run_id"])
    assert (again["how"], again["bytes_sent"], again["digest"]) == ("store", 0, first["digest"])
    rows = world.json("history")
    assert {row["checkpoint"] for row in rows} == {"lab:best.pt"}
    assert len({row["lineage"] for row in rows}) == 1
    assert not [p for p in world.home.rglob("*") if p.is_file() and p.read_bytes() == original]


def test_a_folder_is_copied_once_and_judged_there(world: World, far: Path) -> None:
    world.with_torch()
    edit_far(world, python=yaml.safe_load(world.profile.read_text())["python"])
    folder = world.node / "data" / "step 5"
    write_dcp_checkpoint(folder)
    run = ("--cluster", "other", "--checkpoint", "lab:step 5", "--jobs", "health")
    result = world.json(*run)
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    first = provenance(world, result["run_id"])
    assert digests(Path(first["path"])) == digests(folder)
    assert (first["how"], first["reference"], first["source_path"]) == ("copied", "lab:step 5", str(folder))
    again = provenance(world, world.json(*run)["run_id"])
    assert (again["how"], again["bytes_sent"], again["digest"]) == ("store", 0, first["digest"])


def test_reconstruct_alone_has_the_weights_copied_and_health_later_the_rest_alone(world: World, far: Path) -> None:
    ship_image_adapter(world)
    write_config(world, 48)
    edit_far(world, **{name: world.profile_field(name) for name in ("python", "variables")})
    local = world.node / "data" / "trained.pt"
    write_trained(local, 48)
    manifest, classes = chunks_of(local)
    rest = sum(c.length for c, kind in zip(manifest.chunks, classes, strict=True) if kind is ChunkClass.REST)
    run = ("--checkpoint", "lab:trained.pt", "--config", "eval.yaml", "--num-samples", "2", "--jobs")
    results = {}
    for cluster in ("lab", "other"):
        done = world.cli("--cluster", cluster, *run, "reconstruct", "--json")
        assert done.returncode in (0, 1), done.stderr
        results[cluster] = json.loads(done.stdout)["run_id"]
    artifacts = [digests(world.run_folder(run_id) / "artifacts") for run_id in results.values()]
    assert artifacts[0] == artifacts[1]
    copied = provenance(world, results["other"])
    assert (copied["how"], copied["bytes_sent"], copied["is_complete"]) == ("copied", manifest.size - rest, False)
    assert stored(far) == []
    done = world.cli("--cluster", "other", *run, "health", "--json")
    assert done.returncode in (0, 1), done.stderr
    copied = provenance(world, json.loads(done.stdout)["run_id"])
    assert (copied["bytes_sent"], copied["is_complete"]) == (rest, True)
    assert [path.read_bytes() for path in stored(far)] == [local.read_bytes()]


def test_a_copy_that_is_cut_has_brought_header_and_weights_before_anything_else(world: World, far: Path) -> None:
    local = world.node / "data" / "trained.pt"
    write_trained(local, 224)
    manifest, classes = chunks_of(local)
    order = sorted(range(len(classes)), key=lambda index: (classes[index], index))
    edit_far(world, bandwidth_limit_mbps=8, pack_floats=False)
    client = world.start("--cluster", "other", "--checkpoint", "lab:trained.pt", "--jobs", "count")
    journal = Path(NodeLayout(str(far / "root of ours")).checkpoint_journal(manifest.digest))

    def here() -> set[int]:
        lines = journal.read_text().splitlines()[1:] if journal.exists() else []
        return {int(line.split()[0]) for line in lines if line.endswith(".")}

    until(here)
    client.kill()
    client.communicate(timeout=30)
    until(lambda: not agents_of(world))
    assert here() == set(order[: len(here())])
    assert order != sorted(order)


def test_what_the_run_s_node_has_elsewhere_by_content_is_used_there(world: World, far: Path) -> None:
    copy = far / "data" / "another name.pt"
    copy.write_bytes((world.node / "data" / "best.pt").read_bytes())
    found = provenance(world, world.json(*RUN)["run_id"])
    assert (found["how"], found["path"], found["bytes_sent"]) == ("by_content", str(copy), 0)
    assert stored(far) == []


def test_a_client_killed_amid_the_copy_goes_on_without_the_profile_and_sends_nothing_again(
    world: World, far: Path
) -> None:
    content = make_large(world)
    edit_far(world, bandwidth_limit_mbps=24, pack_floats=False)
    client = world.start(*RUN)
    until(lambda: durable(world, far) >= 16 * 1024 * 1024)
    client.kill()
    client.communicate(timeout=30)
    (run_id,) = world.run_ids()
    assert stored(far) == []
    for name in ("lab.yaml", "other.yaml"):
        world.profile.with_name(name).unlink()
    until(lambda: not agents_of(world))
    before = durable(world, far)
    world.json("resume", run_id, "--bandwidth-limit", "1000")
    assert [path.read_bytes() for path in stored(far)] == [content]
    sent = provenance(world, run_id)["bytes_sent"]
    assert sent == len(content) - before


def test_a_file_that_changes_while_it_is_copied_is_an_error_and_runs_nothing(world: World, far: Path) -> None:
    make_large(world)
    edit_far(world, bandwidth_limit_mbps=24, pack_floats=False)
    client = world.start(*RUN)
    until(lambda: durable(world, far) > 0)
    with (world.node / "data" / "best.pt").open("r+b") as file:
        file.seek(LARGE_BYTES - 4096)
        file.write(os.urandom(64))
    output, _ = client.communicate(timeout=60)
    assert client.returncode == ExitCode.INTEGRITY, output
    assert "changed while it was" in output
    assert stored(far) == []
    assert not (far / "root of ours" / "runs").exists()


def test_a_damaged_checkpoint_is_refused_before_a_byte_moves(world: World, far: Path) -> None:
    path = world.node / "data" / "best.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    world.json(*RUN, expect=int(ExitCode.INTEGRITY))
    assert not (far / "root of ours" / "checkpoints").exists()


def test_what_is_no_checkpoint_is_refused_as_it_is_for_a_local_file(world: World) -> None:
    (world.node / "data" / "best.pt").write_text("words\n")
    (world.project / "words.pt").write_text("words\n")
    there = world.json(*RUN, expect=int(ExitCode.USAGE))
    here = world.json("--checkpoint", "words.pt", "--jobs", "count", expect=int(ExitCode.USAGE))
    assert (there["error"], there["action"]) == (here["error"], here["action"])


def test_a_path_that_is_not_there_is_said_in_a_sentence(world: World) -> None:
    refused = world.json("--cluster", "other", "--checkpoint", "lab:none.pt", "--jobs", "count", expect=2)
    assert refused["error"] == "CheckpointError"
    assert "lab:" in refused["cause"]
    assert "none.pt" in refused["cause"]


def test_a_cluster_that_nobody_knows_is_refused_before_anything_is_planned(world: World) -> None:
    refused = world.json("--cluster", "other", "--checkpoint", "lob:best.pt", "--jobs", "count", expect=2)
    assert "lab" in refused["action"]
    assert world.run_ids() == []


def test_a_source_that_does_not_answer_pauses_the_run_until_it_does(world: World, tmp_path: Path, far: Path) -> None:
    near = start_sshd(tmp_path / "near-sshd")
    keys = {"identity_files": [str(near.client_key)], "known_hosts_file": str(near.known_hosts)}
    world.edit_profile(port=near.port, retry={"patience_s": 1}, **keys)
    near.stop()
    refused = world.json(*RUN, expect=int(ExitCode.UNREACHABLE))
    assert str(near.port) in refused["cause"]
    (run_id,) = world.run_ids()
    assert not (far / "root of ours" / "runs").exists()
    near = start_sshd(near.folder, port=near.port)
    try:
        assert world.json("resume", run_id)["run_id"] == run_id
    finally:
        near.stop()
    assert len(stored(far)) == 1


def test_a_source_that_is_lost_amid_the_copy_is_gone_on_with(world: World, tmp_path: Path, far: Path) -> None:
    content = make_large(world)
    near = start_sshd(tmp_path / "near-sshd")
    keys = {"identity_files": [str(near.client_key)], "known_hosts_file": str(near.known_hosts)}
    world.edit_profile(port=near.port, retry={"patience_s": 1}, **keys)
    edit_far(world, bandwidth_limit_mbps=24, pack_floats=False)
    client = world.start(*RUN)
    until(lambda: durable(world, far) >= 16 * 1024 * 1024)
    cut_off(near)
    output, _ = client.communicate(timeout=100)
    assert client.returncode == ExitCode.UNREACHABLE, output
    (run_id,) = world.run_ids()
    before = durable(world, far)
    near = start_sshd(near.folder, port=near.port)
    try:
        world.json("resume", run_id, "--bandwidth-limit", "1000")
    finally:
        near.stop()
    assert [path.read_bytes() for path in stored(far)] == [content]
    assert provenance(world, run_id)["bytes_sent"] == len(content) - before


def test_a_job_that_began_early_waits_for_a_source_that_is_lost_and_ends_as_one_whose_file_was_there(
    world: World, tmp_path: Path, far: Path
) -> None:
    world.with_torch()
    edit_far(world, python=world.profile_field("python"))
    write_trained(world.node / "data" / "trained.pt", 448)
    near = start_sshd(tmp_path / "near-sshd")
    keys = {"identity_files": [str(near.client_key)], "known_hosts_file": str(near.known_hosts)}
    world.edit_profile(port=near.port, retry={"patience_s": 1}, **keys)
    edit_far(world, bandwidth_limit_mbps=40, pack_floats=False)
    run = ("--cluster", "other", "--checkpoint", "lab:trained.pt", "--jobs", "health")
    client = world.start(*run)
    until(lambda: durable_bytes(far / "root of ours", [world.node / "data" / "trained.pt"]) >= 16 * 1024 * 1024)
    cut_off(near)
    output, _ = client.communicate(timeout=100)
    assert client.returncode == ExitCode.UNREACHABLE, output
    (run_id,) = world.run_ids()
    assert world.json("resume", run_id, expect=int(ExitCode.UNREACHABLE))
    waiting = world.json("status", run_id)["node"]["status"]
    assert (waiting["state"], stored(far)) == ("running", [])
    assert "waiting for the rest" in waiting["jobs"]["health"]["message"]
    near = start_sshd(near.folder, port=near.port)
    try:
        world.json("resume", run_id, "--bandwidth-limit", "1000")
        again = world.json(*run)["run_id"]
    finally:
        near.stop()
    kinds = [entry.kind for entry in Journal(world.home / "data" / "remote-eval.sqlite3").entries(run_id)]
    assert kinds.index("synced_partly") < kinds.index("launched") < kinds.index("stopped") < kinds.index("synced")
    assert kinds.count("launched") == 1
    early, there = (world.run_folder(r) / "artifacts" for r in (run_id, again))
    assert digests(early) == digests(there)
    first, second = provenance(world, run_id), provenance(world, again)
    assert (first.pop("how"), second.pop("how"), second.pop("bytes_sent")) == ("copied", "store", 0)
    first.pop("bytes_sent")
    assert first == second


def test_a_file_whose_chunks_the_source_remembers_is_there_in_full_before_a_job_begins(world: World, far: Path) -> None:
    world.with_torch()
    edit_far(world, python=world.profile_field("python"))
    local = world.node / "data" / "trained.pt"
    write_trained(local, 448)
    until(lambda: time.time() - local.stat().st_ctime > 4)  # what is younger is not remembered
    run = ("--cluster", "other", "--checkpoint", "lab:trained.pt", "--jobs", "health")
    kinds = []
    for _ in range(2):
        run_id = world.json(*run)["run_id"]
        kinds.append([entry.kind for entry in Journal(world.home / "data" / "remote-eval.sqlite3").entries(run_id)])
        shutil.rmtree(far / "root of ours" / "checkpoints")
    assert ["synced_partly" in of_run for of_run in kinds] == [True, False]


def test_a_nightly_target_may_lie_on_another_cluster_or_be_a_folder_here(world: World) -> None:
    write_dcp_checkpoint(world.project / "step 5")
    targets = [
        {"name": "far", "cluster": "other", "checkpoint": "lab:best.pt", "jobs": ["count"]},
        {"name": "folder", "cluster": "other", "checkpoint": "step 5", "jobs": ["count"]},
    ]
    (world.project / "nightly.yaml").write_text(yaml.safe_dump({"targets": targets}))
    tick = ("nightly", "tick", "--file", "nightly.yaml")
    assert [t["status"] for t in world.json(*tick, expect=1)["targets"]] == ["evaluated"] * 2
    assert [t["status"] for t in world.json(*tick, expect=1)["targets"]] == ["unchanged"] * 2
    (world.node / "data" / "best.pt").touch()
    (world.project / "step 5" / "notes.txt").write_text("late\n")
    assert [t["status"] for t in world.json(*tick, expect=1)["targets"]] == ["evaluated"] * 2
