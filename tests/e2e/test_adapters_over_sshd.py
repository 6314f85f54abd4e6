"""A project's own adapter, shipped to the node: evaluated there, and refused early where the model does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.image_project import autoencoder, ship_image_adapter, write_config
from tests.support.world import World


@pytest.fixture
def adapted(world: World) -> World:
    """The project ships the example adapter; images are on the node; `auto.pt` is a local checkpoint of width 8."""
    ship_image_adapter(world)
    torch.manual_seed(0)
    torch.save({"model_state_dict": autoencoder(8).state_dict()}, world.project / "auto.pt")
    write_config(world, width=8)
    return world


ARGUMENTS = ("--checkpoint", "auto.pt", "--config", "eval.yaml", "--jobs", "reconstruct", "--num-samples", "2")


def test_a_shipped_adapter_gives_numbers_and_pictures(adapted: World) -> None:
    done = adapted.cli(*ARGUMENTS, "--json")
    assert done.returncode in (0, 1), done.stderr
    run_id = json.loads(done.stdout)["run_id"]
    results = json.loads((adapted.run_folder(run_id) / "results.json").read_text())
    assert {"mse", "psnr"} <= {m["id"] for m in results["metrics"]}
    assert results["verdict"]["dimensions"]["task_evidence"] in ("fail", "warn")
    pictures = list((adapted.run_folder(run_id) / "artifacts").rglob("*.png"))
    assert len(pictures) >= 2
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert results["provenance"]["code"]["dirty"] is True


def test_a_model_of_another_width_is_refused_before_the_checkpoint_is_sent(adapted: World) -> None:
    write_config(adapted, width=16)
    error = adapted.json(*ARGUMENTS, expect=2)
    assert "structure.shape_mismatch" in error["cause"] + error["details"]
    stored = adapted.node / "root of ours" / "checkpoints"
    sizes = [p.stat().st_size for p in stored.rglob("file")]
    assert (adapted.project / "auto.pt").stat().st_size not in sizes


def test_without_an_adapter_reconstruct_is_not_measured_and_says_what_is_missing(world: World) -> None:
    result = world.with_torch().json("--checkpoint", "lab:best.pt", "--jobs", "reconstruct")
    assert result["verdict"]["dimensions"]["task_evidence"] == "not_measured"
    assert "adapter" in result["verdict"]["reasons"]["task_evidence"].lower()
