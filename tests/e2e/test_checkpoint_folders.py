"""Checkpoints that are folders: inspected on either side, used where they are, never sent."""

from __future__ import annotations

import json
import sys

import yaml

from tests.support.formats import write_dcp_checkpoint, write_deepspeed_checkpoint
from tests.support.world import World


def test_inspect_says_the_same_of_a_folder_on_either_side(world: World) -> None:
    write_dcp_checkpoint(world.project / "step 5")
    write_dcp_checkpoint(world.node / "data" / "step 5")
    here = world.json("inspect", "step 5")["header"]
    there = world.json("inspect", "lab:step 5")["header"]
    assert here["format"] == there["format"] == "torch_dcp"
    assert [t["name"] for t in here["tensors"]] == [t["name"] for t in there["tensors"]]
    assert "torch_dcp" in world.cli("inspect", "lab:step 5").stdout


def test_a_folder_on_the_node_is_examined_in_place(world: World) -> None:
    world.with_torch()
    write_dcp_checkpoint(world.node / "data" / "step 5")
    result = world.json("--checkpoint", "lab:step 5", "--jobs", "health")
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    provenance = (world.run_folder(result["run_id"]) / "provenance.json").read_text()
    assert '"how": "in_place"' in provenance
    assert '"bytes_sent": 0' in provenance


def test_a_folder_that_changed_is_another_checkpoint(world: World) -> None:
    world.with_torch()
    write_deepspeed_checkpoint(world.node / "data" / "zero")
    first = world.json("--checkpoint", "lab:zero", "--jobs", "health")
    (world.node / "data" / "zero" / "late.pt").write_bytes(b"x")
    again = world.json("--checkpoint", "lab:zero", "--jobs", "health")
    folders = [world.run_folder(r["run_id"]) / "provenance.json" for r in (first, again)]
    fingerprints = [f.read_text().partition('"fingerprint"')[2].partition("]")[0] for f in folders]
    assert fingerprints[0] != fingerprints[1]


def test_a_local_folder_for_another_machine_is_refused_with_what_to_do(world: World) -> None:
    write_dcp_checkpoint(world.project / "step 5")
    refused = world.json("--checkpoint", "step 5", "--jobs", "health", expect=2)
    assert "only single files are sent" in refused["cause"]
    assert "CLUSTER:PATH" in str(refused)
    assert not (world.node / "root of ours" / "runs").exists()


def test_a_local_folder_is_examined_where_it_is_on_this_machine(world: World) -> None:
    folder = world.project / "step 5"
    write_dcp_checkpoint(folder)
    profile = {"embedded": True, "node_root": str(world.node / "here"), "python": {"path": sys.executable}}
    (world.profile.parent / "here.yaml").write_text(yaml.safe_dump(profile))
    result = world.json("--cluster", "here", "--checkpoint", str(folder), "--jobs", "health")
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    document = world.run_folder(result["run_id"]) / "artifacts" / "health" / "health.json"
    assert json.loads(document.read_text())["header"]["format"] == "torch_dcp"
