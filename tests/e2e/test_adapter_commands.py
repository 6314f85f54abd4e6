"""`adapter new` and `adapter check`, as a person uses them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.world import World

MODEL = "nn.Sequential(nn.Flatten(1), nn.Linear(48, 48), nn.Unflatten(1, (3, 4, 4)))"


@pytest.fixture
def scaffolded(world: World) -> World:
    """A new adapter whose model is written, its data on the node, and a checkpoint here."""
    world.with_torch()
    done = world.cli("adapter", "new", "evaluation/ours.py", "--kind", "image", "--class", "Ours")
    assert done.returncode == 0, done.stderr
    path = world.project / "evaluation" / "ours.py"
    text = path.read_text()
    line = next(line for line in text.splitlines() if "raise NotImplementedError" in line)
    path.write_text(text.replace(line, f"        return {MODEL}").replace("(3, 64, 64)", "(3, 4, 4)"))
    images = world.node / "data" / "pictures"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for side in ("inputs", "targets"):
            np.save(images / f"{split}_{side}.npy", generator.random((9, 3, 4, 4), dtype=np.float32))
    torch.save(
        {"model_state_dict": eval(MODEL, {"nn": torch.nn}).state_dict()},
        world.project / "ours.pt",
    )
    section = {"data": {"image": "${DATA}/pictures"}}
    (world.project / "eval.yaml").write_text(yaml.safe_dump({"remote_eval": section}))
    world.edit_profile(variables={"DATA": str(world.node / "data")})
    name_it(world, "evaluation.ours:Ours", ["my_jobs", "evaluation"])
    return world


def name_it(world: World, adapter: str, code: list[str]) -> None:
    project = world.project / "remote-eval.yaml"
    values = yaml.safe_load(project.read_text()) | {"adapter": adapter, "code": code, "config": "eval.yaml"}
    project.write_text(yaml.safe_dump(values))
    subprocess.run(["git", "add", "-A"], cwd=world.project, check=True, timeout=30)


def checked(world: World, *more: str, expect: int) -> list[dict[str, Any]]:
    done = world.cli("adapter", "check", *more, "--json")
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_new_adapter_is_well_on_a_node_once_its_model_is_written(scaffolded: World) -> None:
    found = checked(scaffolded, "--checkpoint", "ours.pt", expect=0)
    steps = [check["message"] for check in found if check["name"] == "adapter"]
    assert steps[:4] == ["import", "signatures", "model on the meta device", "shapes against the checkpoint"]
    assert "9 samples of the split 'test'" in steps
    assert steps[-1].startswith("dry run of one sample")
    history = scaffolded.cli("history", "--json")
    assert json.loads(history.stdout) == []


def test_the_source_is_checked_here_without_a_node(scaffolded: World) -> None:
    scaffolded.edit_profile(host="192.0.2.1")
    assert [c["name"] for c in checked(scaffolded, expect=0)] == [
        "file", "syntax", "class", "methods", "signatures", "data",
    ]  # fmt: skip


def test_a_checkpoint_of_another_shape_is_told_with_the_layers_name(scaffolded: World) -> None:
    torch.save(
        {"model_state_dict": {"1.weight": torch.zeros(48, 50), "1.bias": torch.zeros(48)}},
        scaffolded.project / "wide.pt",
    )
    found = checked(scaffolded, "--checkpoint", "wide.pt", expect=2)
    (mismatch,) = [c for c in found if c["name"] == "structure.shape_mismatch"]
    assert "1.weight" in mismatch["message"]


def test_a_model_that_is_not_written_yet_is_told_by_its_method(scaffolded: World) -> None:
    path = scaffolded.project / "evaluation" / "ours.py"
    path.write_text(path.read_text().replace(f"return {MODEL}", 'raise NotImplementedError("write it")'))
    found = checked(scaffolded, "--checkpoint", "ours.pt", expect=2)
    (failed,) = [c for c in found if c["state"] == "error"]
    assert failed["name"] == "adapter.build_model_failed"
    assert "the adapter's build_model failed: NotImplementedError: write it" in failed["message"]


def test_a_source_that_does_not_parse_is_not_sent_anywhere(scaffolded: World) -> None:
    path = scaffolded.project / "evaluation" / "ours.py"
    path.write_text(path.read_text() + "\ndef broken(:\n")
    found = checked(scaffolded, "--checkpoint", "ours.pt", expect=2)
    assert [c["name"] for c in found] == ["file", "syntax"]


def test_a_file_that_is_there_is_never_overwritten(world: World) -> None:
    path = world.project / "adapter.py"
    path.write_text("mine\n")
    error = world.json("adapter", "new", "adapter.py", expect=2)
    assert "stays as it is" in error["cause"]
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("path", ["../adapter.py", "my-adapter.py", "adapter.txt", "/tmp/adapter.py"])
def test_a_path_that_is_no_module_is_refused(world: World, path: str) -> None:
    error = world.json("adapter", "new", path, expect=2)
    assert "cannot be imported" in error["cause"]
    assert not Path(world.project / path).exists()
