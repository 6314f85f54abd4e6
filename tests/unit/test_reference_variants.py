"""Six checkpoints of the reference model, each wrong in its own way but one: the headline says which by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.reconstruct.__main__ import main as reconstruct_main
from remote_payload.reference.__main__ import main as reference_main
from tests.support import reference_variants as variants

pytestmark = pytest.mark.torch
EPOCHS = 30


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the job says of each variant."""
    folder = tmp_path_factory.mktemp("variants")
    film = folder / "film"
    assert reference_main(["prepare", "--out", str(film), "--scale", "64"]) == 0
    train = ["train", "--data", str(film), "--threads", "1"]
    assert reference_main([*train, "--out", str(folder / "good.pt"), "--epochs", str(EPOCHS)]) == 0
    assert reference_main([*train, "--out", str(folder / "epoch00.pt"), "--epochs", "0"]) == 0
    good = torch.load(folder / "good.pt", weights_only=True)
    made = {
        "collapsed": variants.with_collapsed_bottleneck(good),
        "swapped channels": variants.with_swapped_channels(good),
        "wrong layout": variants.with_channels_first(good),
        "wrong range": variants.with_another_range(good, film),
    }
    for name, checkpoint in made.items():
        torch.save(checkpoint, folder / f"{name}.pt")
    return {name: judged(folder, name) for name in ("good", "epoch00", *made)}


def judged(folder: Path, name: str) -> dict[str, Any]:
    out = folder / f"out {name}"
    arguments = ["--checkpoint", str(folder / f"{name}.pt"), "--out", str(out), "--device", "cpu", "--num-samples", "0"]
    adapter = ["--adapter", "remote_payload.reference.adapter:ReferenceAdapter", "--data", f"film={folder / 'film'}"]
    assert reconstruct_main([*arguments, *adapter]) == 0
    found: dict[str, Any] = json.loads((out / "reconstruct.json").read_text())
    return found


def findings(document: dict[str, Any], modality: str) -> set[str]:
    return {f["id"] for f in document["findings"] if modality in f["where"]}


def values(document: dict[str, Any], modality: str) -> set[Any]:
    return {m["value"] for m in document["metrics"] if m["modality"] == modality}


def test_the_good_one_beats_the_train_mean_and_has_nothing_rearranged(documents: dict[str, dict[str, Any]]) -> None:
    assert "video: beats the train mean" in documents["good"]["headline"]
    assert not {i for d in ("good",) for i in findings(documents[d], "video") if i.startswith("reconstruct.")}


def test_the_untrained_one_is_no_better_than_the_train_mean(documents: dict[str, dict[str, Any]]) -> None:
    document = documents["epoch00"]
    assert document["verdict"]["dimensions"]["task_evidence"] == "fail"
    assert "video: is worse than the train mean" in document["headline"] or "constant output" in document["headline"]
    assert not {i for i in findings(document, "video") if i.startswith("reconstruct.")}


def test_the_collapsed_one_gives_constant_outputs(documents: dict[str, dict[str, Any]]) -> None:
    document = documents["collapsed"]
    assert document["headline"].startswith("video: constant output")
    assert document["verdict"]["dimensions"]["task_evidence"] == "fail"
    for name in ("video", "fmri"):
        assert "task.constant_predictor" in findings(document, name)


@pytest.mark.parametrize(
    ("name", "finding", "words"),
    [
        ("swapped channels", "reconstruct.channels_swapped", "channels in the order blue, green, red"),
        ("wrong layout", "reconstruct.layout_mismatch", "axes in the order channel, height, width"),
        ("wrong range", "reconstruct.range_mismatch", "multiplied by 255"),
    ],
)
def test_what_is_arranged_otherwise_is_named_and_not_measured(
    documents: dict[str, dict[str, Any]], name: str, finding: str, words: str
) -> None:
    document = documents[name]
    assert findings(document, "video") == {finding}
    assert "video: not measured" in document["headline"]
    assert words in document["headline"]
    assert values(document, "video") == {None}
    assert document["verdict"]["dimensions"]["task_evidence"] not in ("pass", "not_measured")


def test_what_else_those_models_give_is_measured_all_the_same(documents: dict[str, dict[str, Any]]) -> None:
    for name in ("swapped channels", "wrong layout", "wrong range"):
        assert None not in {
            m["value"] for m in documents[name]["metrics"] if (m["modality"], m["id"]) == ("fmri", "mse")
        }
