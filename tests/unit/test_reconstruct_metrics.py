from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import scipy
from numpy.typing import NDArray

from remote_payload.reconstruct import metrics
from remote_payload.reconstruct.judge import Judgement, judge, overall
from remote_payload.reconstruct.measured import Evaluated, Evidence, Metric
from remote_payload.reconstruct.protocol import Kind, Modality, Role
from remote_payload.wire.codec import to_json
from remote_payload.wire.results import Outcome

RNG = np.random.default_rng(0)
SHAPES: dict[Kind, tuple[str, tuple[int, ...]]] = {
    Kind.IMAGE: ("HWC", (6, 5, 3)),
    Kind.VIDEO: ("HWC", (6, 5, 3)),
    Kind.AUDIO_WAVEFORM: ("T", (90,)),
    Kind.MEL: ("MT", (9, 10)),
    Kind.TEXT_EMBEDDING: ("SD", (3, 30)),
    Kind.VOXELS: ("V", (90,)),
}


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def evaluated(kind: Kind, targets: NDArray[Any], predictions: NDArray[Any], **changes: Any) -> Evaluated:
    layout, shape = SHAPES[kind] if kind is not Kind.CODES else ("KT", (2, targets.shape[1] // 2))
    bounds = (0.0, 7.0) if kind is Kind.CODES else (-10.0, 10.0)
    given: dict[str, Any] = {
        "modality": Modality("m", kind, layout, shape, bounds, "u", Role.TARGET),
        "targets": targets.astype(np.float32),
        "predictions": predictions.astype(np.float32),
        "train_mean": np.zeros(targets.shape[1]),
        "commonest_codes": np.array([0, 0]) if kind is Kind.CODES else None,
        "ordered": False,
        "dependence": 1,
        "seed": 0,
    }
    return Evaluated(**{**given, **changes})


def by_id(found: list[Metric]) -> dict[str, Metric]:
    assert len({m.id for m in found}) == len(found)
    return {m.id: m for m in found}


def verdict_of(case: Evaluated) -> Judgement:
    return judge(metrics.measure(case)[1])


def noisy(noise: float, n: int = 60, d: int = 90) -> tuple[NDArray[Any], NDArray[Any]]:
    targets = RNG.standard_normal((n, d))
    return targets, targets + noise * RNG.standard_normal((n, d))


@pytest.mark.parametrize("kind", list(SHAPES))
def test_a_good_model_passes(kind: Kind) -> None:
    assert verdict_of(evaluated(kind, *noisy(0.3))).outcome is Outcome.PASS


@pytest.mark.parametrize("kind", list(SHAPES))
def test_noise_unrelated_to_the_targets_fails(kind: Kind) -> None:
    targets, _ = noisy(0.0)
    judgement = verdict_of(evaluated(kind, targets, RNG.standard_normal(targets.shape)))
    assert judgement.outcome is Outcome.FAIL
    assert {"task.worse_than_train_mean", "task.chance_level"} == {f.id for f in judgement.findings}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_train_mean_itself_fails_as_a_constant(kind: Kind) -> None:
    targets, _ = noisy(0.0)
    judgement = verdict_of(evaluated(kind, targets, np.zeros_like(targets)))
    assert judgement.outcome is Outcome.FAIL
    assert [f.id for f in judgement.findings] == ["task.constant_predictor"]


@pytest.mark.parametrize("kind", list(SHAPES))
def test_a_constant_prediction_has_no_correlation_and_says_why(kind: Kind) -> None:
    targets, _ = noisy(0.0)
    found, _ = metrics.measure(evaluated(kind, targets, np.zeros_like(targets)))
    similar = [m for m in found if "correlation" in m.id or "cosine" in m.id]
    assert similar
    assert all(m.value is None and m.reason for m in similar)


@pytest.mark.parametrize("kind", list(SHAPES))
def test_a_related_output_on_a_wrong_scale_is_worse_than_the_train_mean(kind: Kind) -> None:
    targets, given = noisy(0.1)
    judgement = verdict_of(evaluated(kind, targets, 4.0 * given))
    assert judgement.outcome is Outcome.FAIL
    assert "worse than the train mean" in judgement.sentence
    assert "above chance" in judgement.sentence


def test_above_chance_without_beating_the_train_mean_is_a_warning() -> None:
    targets = RNG.standard_normal((60, 90))
    given = 0.5 * targets + 0.75**0.5 * RNG.standard_normal((60, 90))
    case = evaluated(Kind.IMAGE, targets, given)
    _, evidence = metrics.measure(case)
    assert evidence.gain is not None
    assert evidence.gain[0] <= 0 <= evidence.gain[1]
    assert judge(evidence).outcome is Outcome.WARN


def test_without_a_training_reference_a_good_model_is_not_measured() -> None:
    judgement = verdict_of(evaluated(Kind.IMAGE, *noisy(0.3), train_mean=None))
    assert judgement.outcome is Outcome.NOT_MEASURED
    assert "no train mean to compare with" in judgement.sentence


def test_too_few_samples_are_not_measured_rather_than_passed() -> None:
    judgement = verdict_of(evaluated(Kind.IMAGE, *noisy(0.01, n=2)))
    assert judgement.outcome is Outcome.NOT_MEASURED
    assert "too few samples" in judgement.sentence


@pytest.mark.parametrize("kind", [*SHAPES, Kind.CODES])
def test_every_metric_is_json_with_unit_n_and_direction(kind: Kind) -> None:
    targets, given = noisy(0.5)
    if kind is Kind.CODES:
        targets = given = RNG.integers(0, 8, (60, 10)).astype(float)
    found, _ = metrics.measure(evaluated(kind, targets, given))
    for metric in found:
        document = json.loads(json.dumps(to_json(metric), allow_nan=False))
        assert document["unit"]
        assert document["n"] == (60 if document["value"] is not None else 0)
        assert document["direction"] in ("higher", "lower")
        assert (document["value"] is None) == (document["reason"] is not None)


def test_the_p_of_a_modalitys_metrics_are_adjusted_as_one_family() -> None:
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 4, (60, 80))
    given = np.where(generator.random((60, 80)) < 0.2, codes, generator.integers(0, 4, (60, 80)))
    given[:, 40:] = generator.integers(0, 4, (60, 40))
    found = [m for m in metrics.measure(evaluated(Kind.CODES, codes, given))[0] if m.details.get("p") is not None]
    by_name = by_id(found)
    assert by_name["code_accuracy_codebook_1"].details["p"] > 0.05 > by_name["code_accuracy_codebook_0"].details["q"]
    ours = [m.details["q"] for m in found]
    np.testing.assert_allclose(ours, scipy.stats.false_discovery_control([m.details["p"] for m in found]))


def test_mse_and_psnr_are_what_they_say() -> None:
    targets = RNG.standard_normal((40, 90))
    found = by_id(metrics.measure(evaluated(Kind.IMAGE, targets, targets + 0.5))[0])
    assert found["mse"].value == pytest.approx(0.25, rel=1e-5)
    assert found["psnr"].value == pytest.approx(10 * np.log10(400 / 0.25), rel=1e-5)
    assert found["mse"].baselines["train_mean"] == pytest.approx(float((targets**2).mean()), rel=1e-5)


def test_an_exact_reconstruction_has_no_finite_psnr_and_says_so() -> None:
    targets, _ = noisy(0.0)
    psnr = by_id(metrics.measure(evaluated(Kind.IMAGE, targets, targets))[0])["psnr"]
    assert psnr.value is None
    assert psnr.reason == "every sample is exact: infinite"


def test_si_sdr_does_not_change_with_the_outputs_loudness() -> None:
    targets, given = noisy(0.1)
    quiet = by_id(metrics.measure(evaluated(Kind.AUDIO_WAVEFORM, targets, given))[0])["si_sdr"]
    loud = by_id(metrics.measure(evaluated(Kind.AUDIO_WAVEFORM, targets, 7 * given))[0])["si_sdr"]
    assert quiet.value is not None
    assert quiet.value == pytest.approx(20.0, abs=1.0)
    assert loud.value == pytest.approx(quiet.value, abs=1e-3)


def test_pattern_correlation_and_voxelwise_correlation_are_not_the_same_number() -> None:
    """A map that never changes correlates over voxels with everything, and over time with nothing."""
    pattern = 5.0 * RNG.standard_normal(90)
    targets = pattern + RNG.standard_normal((60, 90))
    given = pattern + RNG.standard_normal((60, 90))
    found = by_id(metrics.measure(evaluated(Kind.VOXELS, targets, given))[0])
    assert (found["pattern_correlation"].value or 0) > 0.9
    assert abs(found["voxelwise_correlation_median"].value or 0) < 0.1


def test_pattern_correlation_removes_the_train_mean_first() -> None:
    pattern = 5.0 * RNG.standard_normal(90)
    case = evaluated(
        Kind.VOXELS,
        pattern + RNG.standard_normal((60, 90)),
        pattern + RNG.standard_normal((60, 90)),
        train_mean=pattern,
    )
    assert abs(by_id(metrics.measure(case)[0])["pattern_correlation"].value or 0) < 0.1


def test_voxels_without_variance_are_counted_and_left_out() -> None:
    targets, given = noisy(0.1)
    given[:, :10] = 3.0
    median = by_id(metrics.measure(evaluated(Kind.VOXELS, targets, given))[0])["voxelwise_correlation_median"]
    assert median.details["voxels_without_variance"] == 10
    assert (median.value or 0) > 0.9


def test_code_accuracy_is_compared_with_the_commonest_code() -> None:
    codes = RNG.integers(0, 8, (60, 40)).astype(float)
    codes[RNG.random(codes.shape) < 0.7] = 0
    found, evidence = metrics.measure(evaluated(Kind.CODES, codes, np.zeros_like(codes)))
    accuracy = by_id(found)["code_accuracy"]
    assert accuracy.value == pytest.approx(accuracy.chance or 0)
    assert accuracy.baselines["train_commonest_code"] == pytest.approx(accuracy.value or 0)
    assert judge(evidence).outcome is Outcome.FAIL


def test_right_codes_pass_and_each_book_has_its_own_accuracy() -> None:
    codes = RNG.integers(0, 8, (60, 40)).astype(float)
    given = codes.copy()
    given[:, 20:] = RNG.integers(0, 8, (60, 20))
    case = evaluated(Kind.CODES, codes, given)
    found = by_id(metrics.measure(case)[0])
    assert found["code_accuracy_codebook_0"].value == 1.0
    assert (found["code_accuracy_codebook_1"].value or 1) < 0.3
    assert verdict_of(case).outcome is Outcome.PASS


def test_codes_laid_out_time_first_score_the_same() -> None:
    codes = RNG.integers(0, 8, (60, 2, 20)).astype(float)
    given = np.where(RNG.random(codes.shape) < 0.5, codes, 0)
    books_first = evaluated(Kind.CODES, codes.reshape(60, -1), given.reshape(60, -1))
    turned = Modality("m", Kind.CODES, "TK", (20, 2), (0.0, 7.0), "code")
    time_first = evaluated(
        Kind.CODES,
        codes.swapaxes(1, 2).reshape(60, -1),
        given.swapaxes(1, 2).reshape(60, -1),
        modality=turned,
    )
    left, right = (by_id(metrics.measure(c)[0]) for c in (books_first, time_first))
    assert left["code_accuracy_codebook_0"].value == right["code_accuracy_codebook_0"].value
    assert left["code_accuracy"].value == pytest.approx(right["code_accuracy"].value or 0)


def test_measuring_twice_gives_the_same_numbers() -> None:
    case = evaluated(Kind.VOXELS, *noisy(1.0))
    assert metrics.measure(case)[0] == metrics.measure(case)[0]


def judgement(outcome: Outcome, role: Role = Role.TARGET) -> Judgement:
    return Judgement("m", role, outcome, "m: said")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], Outcome.NOT_MEASURED),
        ([Outcome.PASS, Outcome.PASS], Outcome.PASS),
        ([Outcome.FAIL, Outcome.FAIL], Outcome.FAIL),
        ([Outcome.PASS, Outcome.FAIL], Outcome.WARN),
        ([Outcome.PASS, Outcome.NOT_MEASURED], Outcome.WARN),
        ([Outcome.FAIL, Outcome.NOT_MEASURED], Outcome.FAIL),
        ([Outcome.WARN, Outcome.FAIL], Outcome.WARN),
        ([Outcome.NOT_MEASURED], Outcome.NOT_MEASURED),
    ],
)
def test_targets_together(outcomes: list[Outcome], expected: Outcome) -> None:
    assert overall([judgement(o) for o in outcomes])[0] is expected


def test_an_auxiliary_modality_is_told_and_decides_nothing() -> None:
    outcome, headline = overall([judgement(Outcome.PASS), judgement(Outcome.FAIL, Role.AUXILIARY)])
    assert outcome is Outcome.PASS
    assert "beside the verdict" in headline


def test_a_simulated_modality_is_called_simulated_in_the_headline() -> None:
    modality = Modality("fmri", Kind.VOXELS, "V", (4,), None, "z", label="simulated BOLD")
    sentence = judge(Evidence(modality, 10, None, "train_mean", None, None, None)).sentence
    assert sentence.startswith("fmri (simulated)")
