"""Outputs as a set: constant ones, ones that are all alike, and copies of training samples are each told by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remote_payload.reconstruct import metrics
from remote_payload.reconstruct.judge import Judgement, judge
from remote_payload.reconstruct.measured import Evaluated, Metric
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.wire.results import Outcome, Severity

pytestmark = pytest.mark.torch
Array = NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def measured(targets: Array, predictions: Array, training: Array | None = None) -> tuple[dict[str, Metric], Judgement]:
    shape = (targets.shape[1] // 10, 10)
    case = Evaluated(
        Modality("m", Kind.IMAGE, "HW", shape, (-50.0, 50.0), "u"),
        targets.astype(np.float32),
        predictions.astype(np.float32),
        np.zeros(targets.shape[1]),
        None,
        False,
        1,
        0,
        training_targets=None if training is None else training.astype(np.float32),
    )
    found, evidence = metrics.measure(case)
    return {m.id: m for m in found}, judge(evidence)


def ids(judgement: Judgement) -> set[str]:
    return {f.id for f in judgement.findings}


def test_the_similarity_of_outputs_is_the_plain_mean_over_pairs(rng: np.random.Generator) -> None:
    targets, predictions = rng.standard_normal((2, 12, 200)) + np.sin(np.arange(200))
    found = measured(targets, predictions)[0]["output_pairwise_similarity"]
    pairs = np.triu_indices(12, 1)
    assert found.value == pytest.approx(np.corrcoef(predictions.astype(np.float32))[pairs].mean(), abs=1e-6)
    assert found.details["targets"] == pytest.approx(np.corrcoef(targets.astype(np.float32))[pairs].mean(), abs=1e-6)


def test_outputs_that_hardly_differ_are_told_although_they_beat_mean_and_chance(rng: np.random.Generator) -> None:
    """Targets share a pattern that the training mean has not; the outputs are little else than that pattern."""
    pattern, own = rng.standard_normal(200), rng.standard_normal((60, 200))
    found, judgement = measured(pattern + own, pattern + 0.06 * own)
    assert (found["output_variance_ratio"].value or 0) > 1e-3
    assert ids(judgement) == {"task.outputs_alike"}
    assert judgement.outcome is Outcome.WARN
    assert "outputs hardly differ" in judgement.sentence
    (finding,) = judgement.findings
    assert finding.severity is Severity.WARNING
    assert finding.evidence["output_pairwise_similarity"] == found["output_pairwise_similarity"].value


def test_outputs_that_are_training_samples_are_told(rng: np.random.Generator) -> None:
    """Test samples resemble training ones; the model gives the training ones back."""
    training = rng.standard_normal((60, 200))
    targets = training + 0.5 * rng.standard_normal((60, 200))
    found, judgement = measured(targets, training + 0.02 * rng.standard_normal((60, 200)), training)
    assert found["training_copies_share"].value == 1.0
    assert ids(judgement) == {"task.copies_training"}
    assert judgement.outcome is Outcome.WARN
    assert "100% of the outputs copy a training sample" in judgement.sentence


def test_a_good_model_copies_nothing_though_test_resembles_training(rng: np.random.Generator) -> None:
    training = rng.standard_normal((60, 200))
    targets = training + 0.5 * rng.standard_normal((60, 200))
    found, judgement = measured(targets, targets + 0.1 * rng.standard_normal((60, 200)), training)
    assert found["training_copies_share"].value == 0.0
    assert ids(judgement) == set()
    assert judgement.outcome is Outcome.PASS


def test_targets_that_are_training_samples_make_no_exact_model_a_copier(rng: np.random.Generator) -> None:
    training = rng.standard_normal((40, 200))
    found, _ = measured(training, training, training)
    assert found["training_copies_share"].value == 0.0


def test_a_blurry_model_near_the_mean_copies_nothing(rng: np.random.Generator) -> None:
    training, targets = rng.standard_normal((2, 60, 200))
    found, _ = measured(targets, 0.1 * targets, training)
    assert found["training_copies_share"].value == 0.0


def test_without_training_targets_copies_are_not_measured_with_the_reason(rng: np.random.Generator) -> None:
    targets = rng.standard_normal((40, 200))
    found, _ = measured(targets, targets)
    assert found["training_copies_share"].value is None
    assert found["training_copies_share"].reason == "no training targets were given"


def test_constant_outputs_have_no_similarity_and_are_constant_first_of_all(rng: np.random.Generator) -> None:
    targets = rng.standard_normal((40, 200))
    found, judgement = measured(targets, np.zeros_like(targets))
    assert found["output_pairwise_similarity"].reason == "no two outputs have variance over elements"
    assert ids(judgement) == {"task.constant_predictor"}
