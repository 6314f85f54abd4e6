"""What a file's own labels, counters and histories give away: each finding planted, and silent without cause."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.health.job import examine
from remote_payload.jobs.context import JobContext
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, NodePlan, OverrunPolicy
from tests.support.checkpoints import reference_checkpoint

STEPS_PER_EPOCH, EPOCHS = 47, 29


def examined(path: Path, checkpoint: Any) -> dict[str, Any]:
    torch.save(checkpoint, path)
    plan = NodePlan("test", "", (), str(path), EvaluationSettings(), GpuPolicy(device="cpu"), OverrunPolicy())
    document = examine(str(path), "cpu", JobContext(plan, "health", path.parent))
    return dict(json.loads(json.dumps(document, allow_nan=False)))


def found(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f["id"]: f for f in document["findings"]}


def lab_checkpoint() -> dict[str, Any]:
    """The lab's figures, as far as they are known: see the reference model's description."""
    checkpoint = reference_checkpoint(scale=64, dtype=torch.bfloat16)
    state = checkpoint["model_state_dict"]
    for name in ("decoder.layer12_video.1.weight", "decoder.layer12_video.5.weight"):
        state[name].fill_(1)
    for name in ("encoder.layer7_bottleneck.1.bias", "decoder.layer8.0.bias"):
        state[name].zero_()
    state["encoder.video_encoder.bn1.running_var"][0] = 7_274_496
    state["encoder.audio_encoder.bn1.running_var"][0] = 274_432
    for name in ("decoder.layer8.1", "decoder.layer9.1"):
        state[f"{name}.num_batches_tracked"].fill_(2726)
    losses = [300.0 - 14.76 * e for e in range(8)] + [167.15] + [170.0 + 5.5 * e for e in range(19)] + [274.71]
    checkpoint.update(
        epoch=50,
        best_val_loss=167.15,
        val_loss=167.15,
        val_history=[{"loss": x, "fmri_correlation": 0.0013} for x in losses],
        train_history=[{"loss": 900.0 - 6.6 * e, "learning_rate": 1e-3} for e in range(EPOCHS)],
    )
    return checkpoint


def twin_checkpoint() -> dict[str, Any]:
    """The same run trained in float32, saved at its best epoch and labelled as what it is."""
    checkpoint = reference_checkpoint(scale=64, dtype=torch.float32)
    checkpoint["config"]["batch_size"] = 16
    checkpoint["val_history"] = [{"loss": 300.0 - e, "fmri_correlation": 0.01 * e} for e in range(EPOCHS)]
    checkpoint["best_val_loss"] = checkpoint["val_loss"] = 272.0
    return checkpoint


def test_the_labs_figures_reach_the_experts_verdict(tmp_path: Path) -> None:
    document = examined(tmp_path / "best_checkpoint.pt", lab_checkpoint())
    assert document["verdict"]["dimensions"] == {
        "integrity": "pass",
        "provenance": "fail",
        "numerics": "fail",
        "training_dynamics": "fail",
        "task_evidence": "fail",
    }
    findings = found(document)
    assert {i for i, f in findings.items() if f["severity"] == "error"} == {
        "training.epoch_disagrees",
        "training.best_is_last",
        "precision.update_below_ulp",
        "precision.second_moment_stalled",
        "batchnorm.samples_per_rank",
        "task.chance_level",
    }
    assert {"batchnorm.gamma_at_init", "batchnorm.running_var_large", "batchnorm.counter_mismatch"} <= set(findings)
    epoch = findings["training.epoch_disagrees"]["evidence"]
    assert (epoch["history_epochs"], epoch["batches"], epoch["batches_per_epoch"]) == (29, 1363, 47)
    assert epoch["learning_rate_by_batches"] == pytest.approx(5.377e-4, rel=1e-4)
    assert epoch["learning_rate_by_closed_form"] == pytest.approx(5.397e-4, rel=1e-4)
    assert (epoch["warmup_steps"], epoch["steps_after_warmup"]) == (469, 894)
    assert epoch["learning_rate_by_label"] == pytest.approx(1e-6, rel=1e-3)
    best = findings["training.best_is_last"]["evidence"]
    assert (best["best_epoch"], best["last_epoch"], best["best"], best["last"]) == (9, 29, 167.15, 274.71)
    assert best["worse_by"] == pytest.approx(0.643, abs=0.001)
    assert findings["precision.update_below_ulp"]["evidence"]["scales_still_at_one"] == 2


def test_the_correctly_labelled_float32_twin_passes_all_but_the_task(tmp_path: Path) -> None:
    document = examined(tmp_path / "best_checkpoint.pt", twin_checkpoint())
    assert [f["id"] for f in document["findings"] if f["severity"] != "info"] == []
    assert document["verdict"]["dimensions"] == {
        "integrity": "pass",
        "provenance": "pass",
        "numerics": "pass",
        "training_dynamics": "pass",
        "task_evidence": "not_measured",
    }
    assert document["verdict"]["overall"] == "not_measured"


def wrong_epoch(c: dict[str, Any]) -> None:
    c["epoch"] = 50


def wrong_rate(c: dict[str, Any]) -> None:
    c["optimizer_state_dict"]["param_groups"][0]["lr"] = 2e-4


def last_under_the_bests_label(c: dict[str, Any]) -> None:
    c["val_history"] = [{"loss": 200.0 + abs(e - 8)} for e in range(EPOCHS)]
    c["best_val_loss"] = c["val_loss"] = 200.0


def best_worse_than_its_history(c: dict[str, Any]) -> None:
    c["best_val_loss"] = 290.0


def chance(c: dict[str, Any]) -> None:
    c["val_history"] = [{"loss": 300.0 - e, "fmri_correlation": 0.0013} for e in range(EPOCHS)]


def two_samples(c: dict[str, Any]) -> None:
    c["config"]["batch_size"] = 2


def four_samples(c: dict[str, Any]) -> None:
    c["config"]["batch_size"] = 4


def bfloat16_moments(c: dict[str, Any]) -> None:
    for entry in c["optimizer_state_dict"]["state"].values():
        entry["exp_avg_sq"] = entry["exp_avg_sq"].bfloat16()


def pure_bfloat16(c: dict[str, Any]) -> None:
    bfloat16_moments(c)
    for entry in c["optimizer_state_dict"]["state"].values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    state = c["model_state_dict"]
    for name in state:
        state[name] = state[name].bfloat16() if state[name].is_floating_point() else state[name]


@pytest.mark.parametrize(
    ("plant", "finding", "severity"),
    [
        (wrong_epoch, "training.epoch_disagrees", "error"),
        (wrong_rate, "training.schedule_disagrees", "warning"),
        (last_under_the_bests_label, "training.best_is_last", "error"),
        (best_worse_than_its_history, "training.history_contradiction", "warning"),
        (chance, "task.chance_level", "error"),
        (two_samples, "batchnorm.samples_per_rank", "error"),
        (four_samples, "batchnorm.samples_per_rank", "warning"),
        (bfloat16_moments, "precision.second_moment_stalled", "error"),
        (pure_bfloat16, "precision.update_below_ulp", "error"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_planted_defect_is_found_and_explained(
    tmp_path: Path, plant: Callable[[dict[str, Any]], None], finding: str, severity: str
) -> None:
    checkpoint = twin_checkpoint()
    plant(checkpoint)
    findings = found(examined(tmp_path / "c.pt", checkpoint))
    assert findings[finding]["severity"] == severity
    others = {i for i, f in findings.items() if f["severity"] != "info"}
    assert others - {finding} <= {"precision.second_moment_stalled"}
    for part in ("evidence", "explanation", "refuted_by", "action", "where"):
        assert findings[finding][part]


def resumed_history(c: dict[str, Any]) -> None:
    """A run resumed at epoch 19 whose history began anew: the label divides the batches, the history is short."""
    c["epoch"] = 29
    c["val_history"], c["train_history"] = c["val_history"][-10:], c["train_history"][-10:]


def zero_based_epoch(c: dict[str, Any]) -> None:
    c["epoch"] = 28


def best_weights_put_back(c: dict[str, Any]) -> None:
    """The trainer put the best epoch's weights back before it saved: counters say so."""
    last_under_the_bests_label(c)
    for name, tensor in c["model_state_dict"].items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(9 * STEPS_PER_EPOCH)


def last_checkpoint_by_name(c: dict[str, Any]) -> None:
    """A plain last checkpoint that also knows the best loss so far."""
    last_under_the_bests_label(c)
    c["val_loss"] = 220.0


def rate_of_a_chained_schedule(c: dict[str, Any]) -> None:
    c["optimizer_state_dict"]["param_groups"][0]["lr"] = 5.377e-4


def nothing_but_weights(c: dict[str, Any]) -> None:
    state = c["model_state_dict"]
    c.clear()
    c["state_dict"] = state


def float16_moments(c: dict[str, Any]) -> None:
    """float16 has three bits more: a decay of 0.001 shows."""
    for entry in c["optimizer_state_dict"]["state"].values():
        entry["exp_avg_sq"] = (entry["exp_avg_sq"] * 1e4).half()


def synchronised(c: dict[str, Any]) -> None:
    c["config"].update(batch_size=2, sync_batchnorm=True)


def real_correlation_once(c: dict[str, Any]) -> None:
    c["val_history"] = [{"loss": 300.0 - e, "fmri_correlation": 0.3 if e == 4 else 0.001} for e in range(EPOCHS)]


def odd_values(c: dict[str, Any]) -> None:
    c["val_history"] = [{"loss": math.nan, "fmri_correlation": None} for _ in range(EPOCHS)]
    c["config"] = {"learning_rate": "1e-3", "batch_size": None, "num_epochs": True}
    c["best_val_loss"] = math.inf


@pytest.mark.parametrize(
    "change",
    [
        resumed_history,
        zero_based_epoch,
        best_weights_put_back,
        last_checkpoint_by_name,
        rate_of_a_chained_schedule,
        nothing_but_weights,
        float16_moments,
        synchronised,
        real_correlation_once,
        odd_values,
    ],
    ids=lambda v: v.__name__,
)
def test_what_has_an_innocent_explanation_gets_no_warning(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    checkpoint = twin_checkpoint()
    change(checkpoint)
    document = examined(tmp_path / "c.pt", checkpoint)
    assert [f["id"] for f in document["findings"] if f["severity"] != "info"] == []


def test_a_file_that_says_nothing_of_its_training_is_not_measured(tmp_path: Path) -> None:
    checkpoint = twin_checkpoint()
    nothing_but_weights(checkpoint)
    dimensions = examined(tmp_path / "c.pt", checkpoint)["verdict"]["dimensions"]
    assert dimensions["provenance"] == dimensions["training_dynamics"] == "not_measured"
