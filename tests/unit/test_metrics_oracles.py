"""The metrics against scikit-image, scipy and torchmetrics."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy
import skimage
import torch

from remote_payload.reconstruct import audio_metrics, feature_metrics, metrics, noise_ceiling, ssim, statistics
from remote_payload.reconstruct.feature_metrics import Extractor
from remote_payload.reconstruct.identification import choose, identification_metrics, identify, similarities
from remote_payload.reconstruct.measured import Evaluated, Metric
from remote_payload.reconstruct.protocol import Kind, Modality


@pytest.fixture
def oracle() -> ModuleType:
    """torchmetrics. Every worker of a test run imports this file, and one needs the seconds that this takes."""
    return importlib.import_module("torchmetrics.functional")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def case(
    kind: Kind, layout: str, shape: tuple[int, ...], given: object, wanted: object, **changes: object
) -> Evaluated:
    settings: dict[str, object] = {"train_mean": None, "commonest_codes": None, "ordered": False, "dependence": 1}
    bounds = None if kind is Kind.VOXELS else (0.0, 1.0)
    rate = 16000 if kind is Kind.AUDIO_WAVEFORM else None
    modality = Modality("m", kind, layout, shape, bounds, "u", sample_rate_hz=rate)
    rows = [np.asarray(a, dtype=np.float32).reshape(len(a), -1) for a in (wanted, given)]  # type: ignore[arg-type]
    return Evaluated(modality, rows[0], rows[1], **{**settings, "seed": 0, **changes})  # type: ignore[arg-type]


def by_id(found: list[Metric]) -> dict[str, Metric]:
    return {m.id: m for m in found}


def test_pearson_gives_a_reason_where_torchmetrics_gives_nan_or_one(oracle: ModuleType) -> None:
    constant, other = torch.full((999,), 0.1), torch.arange(999.0)
    value, reason = statistics.pearson(constant.numpy(), other.numpy())
    assert value is None
    assert reason == "zero variance in the first series"
    wrong = [
        float(oracle.pearson_corrcoef(constant.bfloat16(), other.bfloat16())),
        float(oracle.pearson_corrcoef(constant, constant)),
    ]
    assert any(np.isnan(w) or abs(w) > 0.99 for w in wrong)


def test_pearson_is_scipys(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 50))
    assert statistics.pearson(a, b)[0] == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-12)


def test_ssim_is_scikit_images(rng: np.random.Generator) -> None:
    a, b = rng.random((2, 4, 23, 31))
    expected = [
        skimage.metrics.structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim.ssim(a, b, 1.0), expected, atol=1e-10)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_ssim_and_psnr_of_colour_images_are_scikit_images(rng: np.random.Generator, layout: str) -> None:
    wanted = rng.random((30, 16, 18, 3)).astype(np.float32)
    given = np.clip(wanted + 0.2 * rng.standard_normal(wanted.shape), 0, 1).astype(np.float32)
    ssims = [
        skimage.metrics.structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2
        )
        for x, y in zip(wanted.astype(float), given.astype(float), strict=True)
    ]
    psnrs = [skimage.metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(wanted, given, strict=True)]
    if layout == "CHW":
        wanted, given = wanted.transpose(0, 3, 1, 2), given.transpose(0, 3, 1, 2)
    found = by_id(metrics.measure(case(Kind.IMAGE, layout, wanted.shape[1:], given, wanted))[0])
    assert found["ssim"].value == pytest.approx(float(np.mean(ssims)), abs=1e-8)
    assert found["psnr"].value == pytest.approx(float(np.mean(psnrs)), abs=1e-4)


def test_si_sdr_is_torchmetrics(rng: np.random.Generator, oracle: ModuleType) -> None:
    wanted = rng.standard_normal((5, 400))
    given = wanted + 0.3 * rng.standard_normal(wanted.shape) + 0.5
    expected = oracle.scale_invariant_signal_distortion_ratio(
        torch.from_numpy(given), torch.from_numpy(wanted), zero_mean=True
    )
    np.testing.assert_allclose(audio_metrics.si_sdr(given, wanted), expected.numpy(), atol=1e-8)


def test_power_spectra_are_scipys(rng: np.random.Generator) -> None:
    wave = rng.standard_normal((2, 1000))
    _, _, expected = scipy.signal.stft(
        wave, window="hann", nperseg=64, noverlap=48, boundary=None, padded=False, scaling="spectrum"
    )
    np.testing.assert_allclose(audio_metrics.power(wave, 64, 16), np.abs(expected.swapaxes(1, 2)) ** 2, atol=1e-12)


def test_a_louder_copy_keeps_its_mel_correlation_and_is_six_decibels_away(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((30, 2000)) * np.linspace(0.1, 1, 2000)
    found = by_id(metrics.measure(case(Kind.AUDIO_WAVEFORM, "T", (2000,), 2 * wanted, wanted))[0])
    assert found["log_mel_correlation"].value == pytest.approx(1.0, abs=1e-6)
    assert found["log_spectral_distance"].value == pytest.approx(20 * np.log10(2), abs=1e-3)


def test_benjamini_hochberg_is_scipys(rng: np.random.Generator) -> None:
    p = rng.random(200) ** 3
    np.testing.assert_allclose(statistics.benjamini_hochberg(p), scipy.stats.false_discovery_control(p), atol=1e-12)


def test_the_frechet_distance_is_that_of_the_matrix_root(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((60, 5)), 0.3 + rng.standard_normal((50, 5)) * np.arange(1, 6)
    first, second = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert feature_metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_two_way_identification_is_the_plain_double_loop(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((25, 40)).astype(np.float32)
    given = (0.3 * wanted + rng.standard_normal(wanted.shape)).astype(np.float32)
    data = case(Kind.VOXELS, "V", (40,), given, wanted)
    candidates = choose(data, data.targets)
    found = identify(similarities(given, wanted, candidates), candidates)
    for i in range(25):
        r = [np.corrcoef(given[i].astype(float), t.astype(float))[0, 1] for t in wanted]
        assert found.two_way[i] == pytest.approx(np.mean([r[i] > r[j] for j in range(25) if j != i]))


def test_a_constant_over_samples_identifies_at_exactly_a_half(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((40, 30))
    same = np.repeat(rng.standard_normal((1, 30)), 40, axis=0)
    data = case(Kind.VOXELS, "V", (30,), same, wanted)
    two_way = identification_metrics(data, "x", data.predictions, data.targets, {}, {})[0]
    assert two_way.value == pytest.approx(0.5)
    assert two_way.chance == 0.5


def test_neighbours_in_time_and_equal_targets_are_no_distractors(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((40, 30))
    wanted[20] = wanted[0]
    data = case(Kind.VOXELS, "V", (30,), wanted, wanted, ordered=True, dependence=5)
    candidates = choose(data, data.targets)
    assert len(candidates.answers) == 39
    assert candidates.right[20] == candidates.right[0]
    assert not candidates.allowed[10, candidates.right[6]]
    assert candidates.allowed[10, candidates.right[5]]
    assert (identify(similarities(wanted, wanted, candidates), candidates).rank == 0).all()


def test_frames_that_move_as_the_film_correlate_whatever_the_still_picture(rng: np.random.Generator) -> None:
    wanted = rng.random((60, 12))
    given = rng.random((1, 12)) * 5 + 0.5 * wanted
    data = case(Kind.VIDEO, "HWC", (2, 2, 3), given, wanted, ordered=True, groups=("a",) * 30 + ("b",) * 30)
    found = by_id(metrics.measure(data)[0])["frame_difference_correlation"]
    assert found.value == pytest.approx(1.0, abs=1e-6)
    assert found.n == 58


def test_every_baseline_stands_beside_a_metric(rng: np.random.Generator) -> None:
    wanted = rng.standard_normal((60, 50))
    other = wanted + rng.standard_normal(wanted.shape)
    baselines = {"ridge": other.astype(np.float32)}
    data = case(Kind.VOXELS, "V", (50,), wanted, wanted, train_mean=np.zeros(50), baselines=baselines)
    found = by_id(metrics.measure(data)[0])
    assert found["mse"].baselines["ridge"] == pytest.approx(float(((other - wanted) ** 2).mean()), rel=1e-4)
    for name in ("voxelwise_correlation_mean", "pattern_correlation", "r2_against_train_mean"):
        assert found[name].baselines["ridge"] < (found[name].value or 0)
    assert found["r2_against_train_mean"].baselines["train_mean"] == pytest.approx(0.0)
    assert "ridge" in found["volume_identification_two_way"].baselines


def test_explainable_variance_of_simulated_repeats_is_the_simulated_one(rng: np.random.Generator) -> None:
    stimulus = np.repeat(np.arange(400), 3)
    signal = rng.standard_normal((400, 20))
    responses = signal[stimulus] + 2.0 * rng.standard_normal((1200, 20))
    assert noise_ceiling.explainable_variance(responses, stimulus).mean() == pytest.approx(0.2, abs=0.02)


def test_split_halves_give_one_subjects_reliability(rng: np.random.Generator) -> None:
    signal = rng.standard_normal((600, 20))
    responses = signal + 2.0 * rng.standard_normal((6, 600, 20))
    assert noise_ceiling.split_half_reliability(responses, 0).mean() == pytest.approx(0.2, abs=0.03)


def test_a_model_that_gives_the_signal_itself_reaches_the_ceiling(rng: np.random.Generator) -> None:
    stimulus = np.repeat(np.arange(300), 2)
    signal = rng.standard_normal((300, 20))[stimulus]
    data = case(
        Kind.VOXELS, "V", (20,), signal, signal + rng.standard_normal(signal.shape), stimuli=tuple(map(str, stimulus))
    )
    found = by_id(metrics.measure(data)[0])
    assert found["share_of_noise_ceiling_repeats"].value == pytest.approx(1.0, abs=0.05)
    assert found["share_of_noise_ceiling_subjects"].value is None


class Scripted(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"2": torch.nn.functional.avg_pool2d(images, 4), "5": images.mean(dim=(2, 3))}


def test_features_of_a_named_network_identify_and_unnamed_ones_are_listed(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    torch.jit.script(Scripted()).save(str(tmp_path / "net.pt"))
    wanted = rng.random((30, 16, 16, 3))
    data = case(Kind.IMAGE, "HWC", (16, 16, 3), wanted, wanted)
    named = Extractor("alexnet", str(tmp_path / "net.pt"), ("2", "5"), frechet=True, covers=("alexnet_2", "alexnet_5"))
    found = by_id(metrics.measure(data, (named,))[0])
    assert found["feature_alexnet_2_two_way"].value == 1.0
    assert found["feature_alexnet_2_distance"].value == pytest.approx(0.0, abs=1e-9)
    assert found["feature_alexnet_5_frechet_distance"].value == pytest.approx(0.0, abs=1e-9)
    with_others = dataclasses.replace(data, baselines={"ridge": data.predictions + 1.0, "shuffled": data.targets[::-1]})
    distance = by_id(metrics.measure(with_others, (named,))[0])["feature_alexnet_5_frechet_distance"]
    assert distance.baselines["ridge"] == pytest.approx(3.0, rel=1e-3)
    assert distance.baselines["shuffled"] is None
    assert "the targets themselves" in distance.details["baselines_without_value"]["shuffled"]
    assert found["feature_clip"].value is None
    assert "none is ever fetched" in (found["feature_clip"].reason or "")
    assert "feature_alexnet_5" not in found


@pytest.mark.parametrize("content", [None, b"no network"])
def test_a_network_that_cannot_be_opened_is_not_measured(
    rng: np.random.Generator, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "net.pt").write_bytes(content)
    wanted = rng.random((10, 4, 4, 3))
    data = case(Kind.IMAGE, "HWC", (4, 4, 3), wanted, wanted)
    found = by_id(metrics.measure(data, (Extractor("clip", str(tmp_path / "net.pt")),))[0])
    assert found["feature_clip"].value is None
    assert "net.pt" in (found["feature_clip"].reason or "")
