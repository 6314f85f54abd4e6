"""Checkpoints that are folders: inspected on either side, used where they are, or sent and put together there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.support.durable import durable_bytes
from tests.support.formats import write_dcp_checkpoint, write_deepspeed_checkpoint, write_fsdp2_checkpoint
from tests.support.world import World, agents_of, digests, until


def provenance(world: World, result: dict[str, Any]) -> dict[str, Any]:
    found = json.loads((world.run_folder(result["run_id"]) / "provenance.json").read_text())
    return dict(found["checkpoint"])


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


def health_of(world: World, result: dict[str, Any]) -> dict[str, Any]:
    """What health found, without where the checkpoint lay and when."""
    path = world.run_folder(result["run_id"]) / "artifacts" / "health" / "health.json"
    document: dict[str, Any] = json.loads(path.read_text())
    return {key: document[key] for key in ("findings", "verdict")}


def add_this_machine(world: World) -> None:
    profile = {"embedded": True, "node_root": str(world.node / "here"), "python": {"path": sys.executable}}
    (world.profile.parent / "here.yaml").write_text(yaml.safe_dump(profile))


def write_safetensors_shards(folder: Path) -> None:
    """As transformers saves a model: shards, their index, and small files beside them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {f"layers.{n}.weight": torch.randn(512, 2300, generator=generator) for n in range(6)}
    names = list(tensors)
    weight_map = {}
    for shard, first in enumerate(range(0, 6, 3), 1):
        file = f"model-{shard:05}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[first : first + 3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").touch()


WRITERS = {
    "dcp": write_dcp_checkpoint,
    "fsdp2": write_fsdp2_checkpoint,
    "deepspeed": write_deepspeed_checkpoint,
    "safetensors": write_safetensors_shards,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_local_folder_is_sent_once_and_judged_as_it_is_here(world: World, kind: str) -> None:
    world.with_torch()
    world.edit_profile(pack_floats=False)
    add_this_machine(world)
    folder = world.project / "step 5"
    WRITERS[kind](folder)
    first = world.json("--checkpoint", "step 5", "--jobs", "health")
    sent = provenance(world, first)
    assert digests(Path(sent["path"])) == digests(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (sent["how"], sent["bytes_sent"]) == ("sent", size)
    here = world.json("--cluster", "here", "--checkpoint", "step 5", "--jobs", "health")
    assert health_of(world, first) == health_of(world, here)
    again = provenance(world, world.json("--checkpoint", "step 5", "--jobs", "health"))
    assert (again["how"], again["bytes_sent"], again["path"]) == ("store", 0, sent["path"])


def test_a_client_killed_amid_a_folder_goes_on_and_sends_nothing_again(world: World) -> None:
    folder = world.project / "step 5"
    folder.mkdir()
    for number in range(3):
        torch.save({f"w{number}": torch.randn(4 * 1024 * 1024)}, folder / f"shard-{number}.pt")
    weight_map = {f"w{number}": f"shard-{number}.pt" for number in range(3)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    root, large = world.node / "root of ours", sorted(folder.glob("*.pt"))
    world.edit_profile(bandwidth_limit_mbps=24, pack_floats=False)
    client = world.start("--checkpoint", "step 5", "--jobs", "count")
    until(lambda: durable_bytes(root, large) >= 8 * 1024 * 1024)
    client.kill()
    client.communicate(timeout=30)
    (run_id,) = world.run_ids()
    assert not list((root / "checkpoints").glob("*/tree"))
    until(lambda: not agents_of(world))
    before = durable_bytes(root, large)
    done = provenance(world, world.json("resume", run_id, "--bandwidth-limit", "1000"))
    assert digests(Path(done["path"])) == digests(folder)
    assert done["bytes_sent"] == sum(path.stat().st_size for path in folder.iterdir()) - before


def test_a_local_folder_is_examined_where_it_is_on_this_machine(world: World) -> None:
    folder = world.project / "step 5"
    write_dcp_checkpoint(folder)
    add_this_machine(world)
    result = world.json("--cluster", "here", "--checkpoint", str(folder), "--jobs", "health")
    assert result["verdict"]["dimensions"]["integrity"] == "pass"
    document = world.run_folder(result["run_id"]) / "artifacts" / "health" / "health.json"
    assert json.loads(document.read_text())["header"]["format"] == "torch_dcp"
