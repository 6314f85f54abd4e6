"""The lab's file and its healthy twin, both trained for real: the expert's verdict with the expert's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.health_plants import (
    LAB_DOUBLE_COUNTERS,
    LAB_FROZEN_SCALES,
    LAB_ZERO_SHIFTS,
    examined,
    findings_of,
    lab_run,
    twin_run,
)

Document = dict[str, Any]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Document:
    path = tmp_path_factory.mktemp("lab") / "best_checkpoint.pt"
    torch.save(lab_run(), path)
    document = examined(path)
    path.unlink()
    return document


def one(document: Document, finding_id: str) -> dict[str, Any]:
    found = findings_of(document, finding_id)
    assert len(found) == 1, finding_id
    return found[0]


def test_the_labs_file_gets_the_experts_verdict(lab: Document) -> None:
    assert lab["verdict"]["overall"] == "fail"
    assert lab["verdict"]["dimensions"] == {
        "integrity": "pass",
        "provenance": "fail",
        "numerics": "fail",
        "training_dynamics": "fail",
        "task_evidence": "fail",
    }


def test_the_labs_table_has_its_counts_right(lab: Document) -> None:
    counts = lab["classes"]["counts"]
    assert (counts["batchnorm_layers"], counts["weight_matrices"], counts["norm_scales"]) == (22, 26, 22)
    constant = {entry["tensor"]: entry["value"] for entry in lab["classes"]["std_zero"]}
    assert constant == {**dict.fromkeys(LAB_FROZEN_SCALES, 1.0), **dict.fromkeys(LAB_ZERO_SHIFTS, 0.0)}
    large = {entry["tensor"]: entry["maximum"] for entry in lab["classes"]["large_values"]}
    assert large == {
        "encoder.video_encoder.bn1.running_var": 7_274_496,
        "encoder.audio_encoder.bn1.running_var": 274_432,
    }


def test_the_epoch_label_is_refuted_by_counters_histories_and_learning_rate(lab: Document) -> None:
    finding = one(lab, "training.epoch_disagrees")
    evidence = finding["evidence"]
    assert (evidence["epoch_label"], evidence["batches"], evidence["history_epochs"]) == (50, 1363, 29)
    assert evidence["batches_per_epoch"] == 47
    assert evidence["learning_rate_by_batches"] == pytest.approx(5.377e-4, rel=1e-4)
    assert evidence["learning_rate_by_closed_form"] == pytest.approx(5.397e-4, rel=1e-4)
    assert evidence["learning_rate_by_label"] == pytest.approx(1e-6, rel=1e-3)
    assert (evidence["warmup_steps"], evidence["steps_after_warmup"]) == (469, 894)
    assert "1363 = 29 x 47" in finding["explanation"]
    assert findings_of(lab, "training.schedule_disagrees") == []


def test_the_best_checkpoint_holds_the_last_weights(lab: Document) -> None:
    evidence = one(lab, "training.best_is_last")["evidence"]
    assert (evidence["best"], evidence["best_epoch"], evidence["last"]) == (167.15, 9, 274.71)
    assert evidence["worse_by"] == pytest.approx(0.64, abs=0.01)


def test_two_frozen_scales_are_rounded_away_and_not_a_minor_inefficiency(lab: Document) -> None:
    finding = one(lab, "batchnorm.gamma_at_init")
    assert set(finding["where"]) == set(LAB_FROZEN_SCALES)
    assert finding["evidence"]["scales"] == 22
    assert {t["cause"] for t in finding["evidence"]["tensors"]} == {"steps_rounded_away"}
    rounding = one(lab, "precision.update_below_ulp")
    assert rounding["severity"] == "error"
    assert (rounding["evidence"]["half_step_at_one"], rounding["evidence"]["half_step_at_one_upwards"]) == (
        2**-9,
        2**-8,
    )
    assert rounding["evidence"]["running_variances_exact_in_bfloat16"] == 44


def test_zero_biases_are_a_zero_gradient_and_not_rounding(lab: Document) -> None:
    finding = one(lab, "weights.constant")
    assert set(finding["where"]) == set(LAB_ZERO_SHIFTS)
    assert {t["cause"] for t in finding["evidence"]["tensors"]} == {"gradient_exactly_zero"}
    assert "rounding cannot hold a value at 0" in finding["explanation"]
    assert set(one(lab, "optimizer.zero_gradient")["where"]) == set(LAB_ZERO_SHIFTS)
    assert len(one(lab, "structure.bias_before_norm")["evidence"]["pairs"]) == 22


def test_the_second_moment_can_only_grow(lab: Document) -> None:
    evidence = one(lab, "precision.second_moment_stalled")["evidence"]
    assert evidence["stalled_fraction"] == pytest.approx(1.0, abs=1e-3)


def test_doubled_counters_mean_an_effective_momentum_of_0_19(lab: Document) -> None:
    finding = one(lab, "batchnorm.counter_mismatch")
    assert finding["evidence"]["effective_momentum"] == pytest.approx(0.19)
    assert finding["evidence"]["counts"] == {"1363": 18, "2726": 4}
    assert {n.rpartition(".")[0] for n in finding["where"]} == set(LAB_DOUBLE_COUNTERS)


def test_two_samples_per_rank_fail_the_training_dynamics(lab: Document) -> None:
    assert one(lab, "batchnorm.samples_per_rank")["severity"] == "error"
    assert one(lab, "batchnorm.running_var_large")["evidence"]["tensors"][0]["maximum"] == 7_274_496


def test_the_loss_is_the_audio_codes_and_about_what_a_constant_scores(lab: Document) -> None:
    assert one(lab, "training.loss_dominated")["evidence"]["share"] == pytest.approx(0.99, abs=1e-3)
    evidence = one(lab, "task.constant_predictor")["evidence"]
    assert evidence["constant"] == pytest.approx(295.6, abs=0.1)
    assert evidence["ratio"] == pytest.approx(0.92, abs=0.01)
    assert one(lab, "task.chance_level")["evidence"]["last"] == 0.0013


def test_every_finding_can_be_argued_with(lab: Document) -> None:
    for finding in lab["findings"]:
        for part in ("where", "evidence", "explanation", "refuted_by", "action", "title"):
            assert finding[part], (finding["id"], part)
        assert 0 < finding["confidence"] <= 1


def test_the_float32_twin_passes_the_first_four_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "best_checkpoint.pt"
    torch.save(twin_run(), path)
    document = examined(path)
    assert [f["id"] for f in document["findings"] if f["severity"] != "info"] == []
    assert document["verdict"]["dimensions"] == {
        "integrity": "pass",
        "provenance": "pass",
        "numerics": "pass",
        "training_dynamics": "pass",
        "task_evidence": "not_measured",
    }
