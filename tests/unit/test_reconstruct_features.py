"""Networks that the user names, and the voxels' map: from the config to the document and the artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from remote_payload.reconstruct.__main__ import main


class Pooled(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model, untrained, evaluated with a network that somebody named."""
    from remote_payload.reference.__main__ import main as reference

    folder = tmp_path_factory.mktemp("features")
    assert reference(["prepare", "--out", str(folder / "data"), "--scale", "128"]) == 0
    assert reference(["train", "--data", str(folder / "data"), "--out", str(folder / "c.pt"), "--epochs", "0"]) == 0
    torch.jit.script(Pooled()).save(str(folder / "pooled.pt"))
    settings = {
        "adapter": "remote_payload.reference.adapter:ReferenceAdapter",
        "data": {"film": str(folder / "data")},
        "features": {"pooled": {"path": str(folder / "pooled.pt"), "layers": ["pooled"]}},
        "metric_samples": 24,
    }
    (folder / "eval.json").write_text(json.dumps({"remote_eval": settings}))
    arguments = ["--checkpoint", str(folder / "c.pt"), "--config", str(folder / "eval.json")]
    assert main([*arguments, "--out", str(folder / "out"), "--device", "cpu", "--num-samples", "1"]) == 0
    return folder / "out"


def metrics(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "reconstruct.json").read_text())["metrics"]
    return found


def test_a_named_network_gives_metrics_of_the_video_alone(evaluated: Path) -> None:
    named = [m for m in metrics(evaluated) if "pooled" in m["id"]]
    assert {m["modality"] for m in named} == {"video"}
    assert any(m["value"] is not None for m in named)


def test_networks_that_nobody_named_are_not_measured(evaluated: Path) -> None:
    (found,) = [m for m in metrics(evaluated) if m["id"] == "feature_lpips"]
    assert found["value"] is None
    assert found["reason"]


def test_the_voxels_map_is_an_artifact_with_the_median_of_the_document(evaluated: Path) -> None:
    (path,) = evaluated.glob("*.npy")
    correlations = np.load(path, allow_pickle=False)
    (median,) = [m["value"] for m in metrics(evaluated) if m["id"] == "voxelwise_correlation_median"]
    assert correlations.dtype == np.float32
    assert np.nanmedian(correlations) == pytest.approx(median, abs=1e-6)
