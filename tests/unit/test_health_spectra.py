"""The opt-in passes over weight matrices, against torch's own singular values and laws whose exponent is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import load_config
from orchestrator.errors import ConfigurationError
from remote_payload.checkpoint import read_header
from remote_payload.health import spectra
from remote_payload.health.__main__ import main
from remote_payload.health.facts import SpectraFacts
from remote_payload.health.scan import scan
from remote_payload.health.spectra import fit_power_law, measure_spectra


def measured(path: Path, *passes: str) -> SpectraFacts:
    header = read_header(str(path))
    result = scan(header, "cpu", lambda _done, _total: None)
    return measure_spectra(header, result, passes, "cpu", 0, lambda _done, _total: None)


def saved(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"{name}.weight": value for name, value in tensors.items()}}, path)
    return path


@pytest.mark.parametrize("block_bytes", [1 << 26, 4000])
@pytest.mark.parametrize("passes", [("spectral",), ("spectrum",)])
def test_norm_and_stable_rank_are_those_of_torchs_singular_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: tuple[str, ...], block_bytes: int
) -> None:
    monkeypatch.setattr(spectra, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    low_rank = torch.randn(90, 3) @ torch.randn(3, 60) + 0.01 * torch.randn(90, 60)
    tensors = {
        "tall": torch.randn(120, 30),
        "wide": torch.randn(30, 120),
        "low_rank": low_rank,
        "conv": torch.randn(16, 4, 3, 3),
        "half": torch.randn(40, 40).bfloat16(),
        "double": torch.randn(40, 20).double(),
    }
    facts = measured(saved(tmp_path, **tensors), *passes)
    assert facts.not_measured == {}
    for name, tensor in tensors.items():
        values = torch.linalg.svdvals(tensor.double().reshape(tensor.shape[0], -1))
        found = facts.tensors[f"{name}.weight"]
        assert found.converged
        assert found.spectral_norm == pytest.approx(float(values[0]), rel=1e-4), name
        assert found.frobenius_norm == pytest.approx(float(values.norm()), rel=1e-6)
        assert found.stable_rank == pytest.approx(float((values.norm() / values[0]) ** 2), rel=1e-3)
        if passes == ("spectrum",):
            expected = np.quantile(values.numpy(), (0.0, 0.25, 0.5, 0.75, 1.0))
            assert found.singular_value_quantiles == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)
        else:
            assert found.singular_value_quantiles is None


@pytest.mark.parametrize("alpha", [2.0, 3.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    generator = np.random.default_rng(1)
    tail = 2.0 * (1 - generator.random(1500)) ** (-1 / (alpha - 1))
    fit = fit_power_law(np.concatenate([tail, 2.0 * generator.random(500)]))
    assert fit is not None
    assert abs(fit.alpha - alpha) < 4 * fit.alpha_error
    assert fit.distance < 0.05
    assert 1.0 < fit.x_min < 6.0


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    values = np.random.default_rng(2).pareto(1.7, 400) + 1
    fit = fit_power_law(values)
    assert fit is not None
    tail = values[values >= fit.x_min]

    def likelihood(alpha: float) -> float:
        return len(tail) * math.log((alpha - 1) / fit.x_min) - alpha * float(np.log(tail / fit.x_min).sum())

    assert likelihood(fit.alpha) > max(likelihood(fit.alpha * 1.01), likelihood(fit.alpha / 1.01))
    assert fit.tail == len(tail)


@pytest.mark.parametrize("values", [np.ones(50), np.zeros(50), np.arange(1.0, 9.0)])
def test_no_law_is_fitted_to_what_has_no_tail(values: np.ndarray) -> None:
    assert fit_power_law(values) is None


def test_a_matrix_of_zeros_has_no_stable_rank_and_one_with_nan_no_spectrum(tmp_path: Path) -> None:
    bad = torch.randn(20, 20)
    bad[3, 4] = float("nan")
    path = saved(tmp_path, zero=torch.zeros(20, 30), bad=bad, turned=torch.randn(20, 30).t())
    for passes in ("spectral", "spectrum"):
        facts = measured(path, passes)
        assert facts.tensors["zero.weight"].stable_rank is None
        assert facts.tensors["zero.weight"].spectral_norm == 0
        assert "not finite" in facts.not_measured["bad.weight"]
        assert "turned.weight" in facts.not_measured


def test_spectra_stand_in_the_document_only_if_they_were_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.randn(64, 48))
    assert main([str(path), "--out", str(tmp_path / "without")]) == 0
    assert json.loads((tmp_path / "without/health.json").read_text())["spectra"] is None
    assert main([str(path), "--out", str(tmp_path / "with"), "--passes", "spectral,spectrum"]) == 0
    found = json.loads((tmp_path / "with/health.json").read_text())["spectra"]["tensors"]["a.weight"]
    assert found["power_law"]["alpha"] > 1
    assert found["stable_rank"] > 1


def test_an_unknown_pass_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(saved(tmp_path, a=torch.randn(4, 4))), "--out", str(tmp_path / "out"), "--passes", "magic"])
    assert "unknown passes: magic" in capsys.readouterr().err


def test_a_config_asks_for_passes(tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    config.write_text("remote_eval:\n  health_passes: [spectral]\n")
    loaded = load_config(config, num_samples=1, adapter=None, variables={}, data_base=None)
    assert loaded.settings.health_passes == ("spectral",)
    config.write_text("remote_eval:\n  health_passes: [magic]\n")
    with pytest.raises(ConfigurationError):
        load_config(config, num_samples=1, adapter=None, variables={}, data_base=None)
