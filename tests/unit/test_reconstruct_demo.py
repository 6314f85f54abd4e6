"""The demonstration's own way: prepared data, a trained checkpoint, the reference adapter, the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.reconstruct.__main__ import main as reconstruct_main
from remote_payload.reconstruct.preflight import check
from remote_payload.reference.__main__ import main as reference_main
from remote_payload.wire.names import check_artifact_path
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy

pytestmark = pytest.mark.torch
ADAPTER = "remote_payload.reference.adapter:ReferenceAdapter"
EPOCHS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    assert reference_main(["prepare", "--out", str(path / "film"), "--scale", "64"]) == 0
    train = ["train", "--data", str(path / "film"), "--threads", "1"]
    assert reference_main([*train, "--out", str(path / "good.pt"), "--epochs", str(EPOCHS)]) == 0
    assert reference_main([*train, "--out", str(path / "epoch00.pt"), "--epochs", "0"]) == 0
    return path


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    return run(folder, "good", folder / "out-good")


def run(folder: Path, name: str, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["--checkpoint", str(folder / f"{name}.pt"), "--out", str(out), "--adapter", ADAPTER]
    assert reconstruct_main([*arguments, "--data", f"film={folder / 'film'}", "--device", "cpu", *more]) == 0
    found: dict[str, Any] = json.loads((out / "reconstruct.json").read_text())
    return found


def plan(folder: Path, checkpoint: Path, **settings: Any) -> NodePlan:
    given = {"adapter": ADAPTER, "data": {"film": str(folder / "film")}, **settings}
    return NodePlan(
        "r",
        "0" * 64,
        (JobSpec("reconstruct"),),
        str(checkpoint),
        EvaluationSettings(**given),
        GpuPolicy("cpu"),
        OverrunPolicy(),
    )


def metric(document: dict[str, Any], modality: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in document["metrics"] if (m["modality"], m["id"]) == (modality, name)]
    return dict(found)


def test_the_trained_model_beats_the_train_mean_on_film_it_has_not_seen(document: dict[str, Any]) -> None:
    mse = metric(document, "video", "mse")
    assert mse["value"] < 0.85 * mse["baselines"]["train_mean"]
    assert mse["n"] == document["samples"]["available"]
    assert "video: beats the train mean" in document["headline"]


def test_the_untrained_model_fails(folder: Path, tmp_path: Path) -> None:
    document = run(folder, "epoch00", tmp_path)
    assert document["verdict"]["dimensions"]["task_evidence"] == "fail"
    assert document["verdict"]["overall"] == "fail"
    assert {f["id"] for f in document["findings"]} & {"task.constant_predictor", "task.worse_than_train_mean"}


def test_only_the_task_is_judged(document: dict[str, Any]) -> None:
    dimensions = document["verdict"]["dimensions"]
    assert {d for d, o in dimensions.items() if o != "not_measured"} == {"task_evidence"}
    assert document["verdict"]["overall"] in ("not_measured", "warn", "fail")


def test_simulated_bold_is_called_simulated_wherever_it_appears(document: dict[str, Any]) -> None:
    assert "fmri (simulated)" in document["headline"]
    captions = [p["caption"] for p in document["pictures"] if p["modality"] == "fmri"]
    assert captions
    assert all("simulated" in caption for caption in captions)
    assert all("simulated" in m["label"] for m in document["modalities"] if m["name"] == "fmri")


def test_every_metric_has_the_documented_form(document: dict[str, Any]) -> None:
    keys = {
        "id", "version", "modality", "value", "reason", "unit", "n", "direction", "chance", "interval", "baselines",
        "parameters", "details",
    }  # fmt: skip
    identities = [(m["modality"], m["id"]) for m in document["metrics"]]
    assert len(set(identities)) == len(identities)
    for found in document["metrics"]:
        assert set(found) == keys
        assert found["direction"] in ("higher", "lower")
        assert (found["value"] is None) == (found["reason"] is not None)


def test_every_picture_that_is_named_is_there_and_no_other(folder: Path, document: dict[str, Any]) -> None:
    named = {p["path"] for p in document["pictures"]}
    there = {f"reconstruct/{p.relative_to(folder / 'out-good')}" for p in (folder / "out-good").rglob("*.png")}
    assert named == there
    for picture in document["pictures"]:
        check_artifact_path(picture["path"])
        assert picture["kind"] == "image"
        assert picture["title"]
        assert picture["caption"]


def test_num_samples_counts_pictures_and_not_metrics(folder: Path, document: dict[str, Any], tmp_path: Path) -> None:
    fewer = run(folder, "good", tmp_path, "--num-samples", "1")
    assert len({p["sample"] for p in fewer["pictures"] if p["sample"]}) == 1
    assert len({p["sample"] for p in document["pictures"] if p["sample"]}) == 4
    assert fewer["metrics"] == document["metrics"]


def test_metric_samples_bounds_what_is_evaluated(folder: Path, tmp_path: Path) -> None:
    document = run(folder, "good", tmp_path, "--metric-samples", "10", "--num-samples", "0")
    assert metric(document, "video", "mse")["n"] == 10
    assert document["samples"]["evaluated"] == 10
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 10


def test_the_per_sample_file_has_a_line_for_each_sample_and_the_same_mean(
    folder: Path, document: dict[str, Any]
) -> None:
    lines = [json.loads(line) for line in (folder / "out-good" / "samples.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(document["samples"]["evaluated"]))
    mean = float(np.mean([line["modalities"]["video"]["mse"] for line in lines]))
    assert mean == pytest.approx(metric(document, "video", "mse")["value"])
    silent = [line for line in lines if not line["sample"].startswith("bigbuckbunny")]
    assert silent
    assert all("audio" not in line["modalities"] for line in silent)


def test_running_twice_gives_byte_identical_artifacts(folder: Path, document: dict[str, Any], tmp_path: Path) -> None:
    run(folder, "good", tmp_path)
    first, second = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (folder / "out-good", tmp_path)
    )
    assert first == second


def test_the_batch_size_does_not_change_the_numbers(folder: Path, document: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"remote_eval": {"batch_size": 5}}))
    other = run(folder, "good", tmp_path / "out", "--config", str(config))
    for found, same in zip(document["metrics"], other["metrics"], strict=True):
        assert (found["value"] is None) == (same["value"] is None)
        if found["value"] is not None:
            assert same["value"] == pytest.approx(found["value"], rel=1e-3, abs=1e-5)


def test_the_checkpoints_labels_counters_schedule_and_histories_agree(folder: Path) -> None:
    held = torch.load(folder / "good.pt", weights_only=True)
    assert set(held) == {
        "epoch", "global_step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "best_val_loss",
        "val_loss", "config", "train_history", "val_history",
    }  # fmt: skip
    steps = held["global_step"] // held["epoch"]
    assert held["epoch"] * steps == held["global_step"]
    assert held["model_state_dict"]["encoder.video_encoder.bn1.num_batches_tracked"] == held["global_step"]
    assert held["optimizer_state_dict"]["state"][0]["step"] == held["global_step"]
    assert held["scheduler_state_dict"]["last_epoch"] == held["global_step"]
    assert len(held["train_history"]) == len(held["val_history"]) == held["epoch"]
    losses = [entry["loss"] for entry in held["val_history"]]
    assert held["val_loss"] == held["best_val_loss"] == min(losses) == losses[-1]
    rate = held["optimizer_state_dict"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(held["val_history"][-1]["learning_rate"])
    assert rate == pytest.approx(expected_rate(held["config"], steps, held["global_step"]), rel=1e-6)


def expected_rate(config: dict[str, Any], steps: int, done: int) -> float:
    """Linear from 1e-5 over the warm-up, then a cosine down to min_lr."""
    warm, total = config["warmup_epochs"] * steps, config["num_epochs"] * steps
    top, bottom = config["learning_rate"], config["min_lr"]
    if done < warm:
        return float(1e-5 + (top - 1e-5) * done / warm)
    return float(bottom + (top - bottom) * (1 + np.cos(np.pi * (done - warm) / (total - warm))) / 2)


def test_the_checkpoint_is_read_by_our_own_reader_as_the_laboratorys_form(folder: Path) -> None:
    header = read_header(folder / "good.pt")
    assert header.entry_count == 162
    assert header.problems == ()
    assert header.config["scale"] == 64
    assert header.config["warmup_epochs"] == EPOCHS // 10
    assert header.dtypes.keys() >= {"float32", "int64"}


def test_epoch_zero_has_taken_no_step(folder: Path) -> None:
    held = torch.load(folder / "epoch00.pt", weights_only=True)
    assert (held["epoch"], held["global_step"], held["val_history"]) == (0, 0, [])
    assert held["optimizer_state_dict"]["state"] == {}
    assert held["model_state_dict"]["encoder.video_encoder.bn1.num_batches_tracked"] == 0


def test_training_twice_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        train = [
            "train",
            "--data",
            str(folder / "film"),
            "--out",
            str(path),
            "--epochs",
            "2",
            "--threads",
            "1",
        ]
        assert reference_main(train) == 0
    first, second = (torch.load(p, weights_only=True)["model_state_dict"] for p in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_preflight_finds_nothing_wrong_with_the_demonstration(folder: Path) -> None:
    assert check(plan(folder, folder / "good.pt"), read_header(folder / "good.pt")) == []


def test_another_input_width_is_refused_before_anything_is_loaded(folder: Path) -> None:
    wrong = plan(folder, folder / "good.pt", user_config={"scale": 32})
    found = {f.id: f for f in check(wrong, read_header(folder / "good.pt"))}
    mismatch = found["structure.shape_mismatch"]
    assert "encoder.video_encoder.fc1.weight" in mismatch.where
    assert mismatch.evidence["count"] > 50


def test_data_of_another_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "film" / "manifest.json").read_text())
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "manifest.json").write_text(json.dumps({**manifest, "scale": 128}))
    (found,) = check(plan(tmp_path, folder / "good.pt"), read_header(folder / "good.pt"))
    assert "at scale 64" in found.title
    assert "at 128" in found.title


def test_a_config_without_the_data_is_refused_by_name(folder: Path) -> None:
    (found,) = check(plan(folder, folder / "good.pt", data={"movie": "x"}), read_header(folder / "good.pt"))
    assert found.id == "adapter.data_missing"
    assert "film" in found.title


def test_training_on_a_folder_without_data_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference_main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "holds no demonstration data" in capsys.readouterr().err
