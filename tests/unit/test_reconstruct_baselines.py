"""What simple predictors give, each against a plain way of the same, and in a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct import nulls, products, ridge, sample_metrics, statistics, training
from remote_payload.reconstruct.baselines import NAMES, simple_predictors
from remote_payload.reconstruct.job import run as run_job
from remote_payload.reconstruct.measured import Evaluated
from remote_payload.reconstruct.protocol import AdapterBase, Kind, Modality, Sample
from remote_payload.reconstruct.stimuli import StimulusError, StimulusSpace, contains
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy

pytestmark = pytest.mark.torch
Array = NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def modality(width: int, name: str = "m") -> Modality:
    return Modality(name, Kind.VOXELS, "V", (width,), None, "z")


def rows_of(targets: Array, **changes: Any) -> Evaluated:
    given = {
        "modality": modality(targets.shape[1]),
        "targets": targets.astype(np.float32),
        "predictions": targets.astype(np.float32),
        "train_mean": np.zeros(targets.shape[1]),
        "commonest_codes": None,
        "ordered": True,
        "dependence": 1,
        "seed": 0,
        "groups": ("g",) * len(targets),
    }
    return Evaluated(**{**given, **changes})


def given_by(evaluated: Evaluated, name: str, positions: list[int] | None = None) -> Any:
    every = simple_predictors(evaluated, positions or list(range(len(evaluated.targets))), None, None, None, Path())
    (found,) = [p for p in every if p.name == name]
    return None if found.rows is None else np.asarray(found.rows[:])


def test_products_of_pairs_are_the_plain_loops(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 100)
    a, b = rng.standard_normal((7, 300)) + 5.0, rng.standard_normal((9, 300)) + 5.0
    centre = rng.standard_normal(300)
    errors = [[((x - y) ** 2).mean() for y in b] for x in a]
    np.testing.assert_allclose(products.mean_squared_errors(a, b), errors, rtol=1e-12)
    r = [[np.corrcoef(x - centre, y - centre)[0, 1] for y in b] for x in a]
    np.testing.assert_allclose(products.correlations(a, b, centre), r, atol=1e-12)
    cosine = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    np.testing.assert_allclose(products.cosines(a, b), cosine, atol=1e-12)


def test_a_constant_row_correlates_with_nothing(rng: np.random.Generator) -> None:
    found = products.correlations(np.full((1, 50), 0.1), rng.standard_normal((3, 50)))
    assert np.isnan(found).all()


def test_a_reordered_view_is_the_reordered_array(rng: np.random.Generator) -> None:
    rows, order, otherwise = rng.standard_normal((6, 8)), np.array([3, -1, 0, -1, 5]), rng.standard_normal(8)
    expected = rows[order]
    expected[order < 0] = otherwise
    view = products.Reordered(rows, order, otherwise)
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view[:], expected)
    np.testing.assert_array_equal(view[1:4, 2:5], expected[1:4, 2:5])
    np.testing.assert_array_equal(view[np.array([4, 1])], expected[[4, 1]])


@pytest.mark.parametrize(("count", "features"), [(20, 200), (60, 8)])
def test_ridge_by_samples_is_ridge_by_features(rng: np.random.Generator, count: int, features: int) -> None:
    x, y, shown = (rng.standard_normal(s) for s in ((count, features), (count, 5), (11, features)))
    x, shown = x + 3.0, shown + 3.0
    fit = ridge.fit_ridge(x, y, shown, 1)
    assert fit is not None
    centred, mean = x - x.mean(axis=0), y.mean(axis=0)
    penalty = fit.penalty * (centred**2).sum() / count
    plain = np.linalg.solve(centred.T @ centred + penalty * np.eye(features), centred.T @ (y - mean))
    np.testing.assert_allclose(
        mean + fit.weights @ (y - mean), mean + (shown - x.mean(axis=0)) @ plain, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("block", [1, 4])
def test_errors_on_left_out_samples_are_those_of_fitting_without_them(rng: np.random.Generator, block: int) -> None:
    count, penalty = 40, 3.0
    x, y = rng.standard_normal((count, 60)), rng.standard_normal((count, 7))
    kernel = x @ x.T
    values, vectors = np.linalg.eigh(kernel)
    stretches = ridge._stretches(count, block)
    plain = stretches or [(slice(i, i + 1), slice(0, 1)) for i in range(count)]
    total = 0.0
    for left_out, counted in plain:
        fitted = np.ones(count, dtype=bool)
        fitted[left_out] = False
        weights = np.linalg.solve(kernel[fitted][:, fitted] + penalty * np.eye(fitted.sum()), y[fitted])
        total += float(((y[left_out] - kernel[left_out][:, fitted] @ weights)[counted] ** 2).sum())
    assert ridge._left_out_error(values, vectors, y @ y.T, penalty, stretches) == pytest.approx(total)


def test_every_sample_counts_once_and_is_away_from_what_was_fitted() -> None:
    stretches = ridge._stretches(254, 10)
    counted = np.concatenate([np.arange(254)[wide][inner] for wide, inner in stretches])
    assert counted.tolist() == list(range(254))
    for wide, inner in stretches:
        fitted = np.delete(np.arange(254), np.arange(254)[wide])
        assert np.abs(np.arange(254)[wide][inner][:, None] - fitted[None]).min() > 10


def test_neighbours_in_the_fit_do_not_talk_the_penalty_down(rng: np.random.Generator) -> None:
    """Inputs and noise that move slowly: left out one by one, the neighbours give the noise away."""

    def slow(width: int) -> Array:
        steps = rng.standard_normal((200 + 20, width))
        return np.asarray(sum(steps[k : k + 200] for k in range(20)) / np.sqrt(20))

    x, noise = slow(400), slow(30)
    y = 0.3 * x[:, :30] + noise
    one_by_one, by_stretches = (ridge.fit_ridge(x, y, x, block) for block in (1, 20))
    assert one_by_one is not None
    assert by_stretches is not None
    assert by_stretches.penalty >= 10 * one_by_one.penalty


def test_inputs_that_do_not_vary_give_no_regression(rng: np.random.Generator) -> None:
    assert ridge.fit_ridge(np.zeros((9, 4)), rng.standard_normal((9, 2)), np.zeros((1, 4)), 1) is None


def test_hashed_inputs_keep_their_distances(rng: np.random.Generator) -> None:
    images = np.cumsum(rng.standard_normal((12, 60_000)), axis=1) / 100.0
    space = StimulusSpace({"x": images[0]}, seed=0, widest=16_384)
    hashed = np.stack([space.row({"x": image}) for image in images])
    assert hashed.shape == (12, 16_384)
    exact = products.mean_squared_errors(images, images) * images.shape[1]
    near = products.mean_squared_errors(hashed, hashed) * hashed.shape[1]
    off = ~np.eye(12, dtype=bool)
    assert np.abs(near[off] / exact[off] - 1.0).max() < 0.06


def test_each_input_weighs_the_same_whatever_its_width_and_scale(rng: np.random.Generator) -> None:
    given = [{"wide": 1e3 * rng.standard_normal(500), "narrow": rng.standard_normal(3)} for _ in range(50)]
    space = StimulusSpace(given[0], seed=0)
    rows = np.stack([space.row(g) for g in given])
    mean, scale = space.standardise(rows)
    standard = (rows - mean) / scale
    narrow, wide = standard[:, :3], standard[:, 3:]
    assert (narrow**2).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-4)
    assert (wide**2).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"x": "a sentence"}, {}, "no array of numbers"),
        ({"x": np.zeros(3)}, {"x": np.zeros(4)}, "differs in shape"),
        ({"x": np.zeros(3)}, {"y": np.zeros(3)}, "different inputs"),
        ({"x": np.zeros(3)}, {"x": np.array([0, np.nan, 0])}, "NaN"),
        ({}, {}, "no inputs"),
        (torch.zeros(3), {}, "no mapping"),
        ({"x": np.zeros(3)}, "words", "no mapping"),
        ({"x": [[1.0], [1.0, 2.0]]}, {}, "no array of numbers"),
    ],
)
def test_inputs_that_cannot_be_laid_side_by_side_say_why(first: Any, second: Any, words: str) -> None:
    with pytest.raises(StimulusError, match=words):
        StimulusSpace(first, seed=0).row(second)


def test_a_target_is_found_among_the_inputs_as_a_whole_or_as_a_piece(rng: np.random.Generator) -> None:
    frames = rng.random((10, 12)).astype(np.float32)
    assert contains({"video": torch.tensor(frames), "text": "words"}, frames[-1].reshape(3, 4))
    assert contains({"image": frames}, frames)
    assert not contains({"video": frames}, frames[-1] + 1e-3)
    assert not contains({"text": "words"}, frames[0])


def test_no_shuffled_sample_keeps_its_own_target(rng: np.random.Generator) -> None:
    targets = rng.standard_normal((31, 4))
    found = given_by(rows_of(targets), "shuffled")
    assert not (found == targets.astype(np.float32)).any()
    assert sorted(found[:, 0]) == sorted(targets[:, 0].astype(np.float32))


@pytest.mark.parametrize(("dependence", "by"), [(4, 15), (22, 22)])
def test_shifted_targets_are_fifteen_samples_or_the_dependence_away(dependence: int, by: int) -> None:
    targets = np.arange(60.0)[:, None] * np.ones(3)
    found = given_by(rows_of(targets, dependence=dependence), "time_shifted")
    assert found[:, 0].tolist() == [(i + by) % 60 for i in range(60)]
    assert given_by(rows_of(targets[: 2 * by - 1], dependence=dependence), "time_shifted") is None


def test_the_previous_sample_is_of_the_same_group_and_the_first_gets_the_mean() -> None:
    targets = np.arange(6.0)[:, None] * np.ones(3)
    found = given_by(rows_of(targets, groups=tuple("aaabbb"), train_mean=np.full(3, 9.0)), "previous_sample")
    assert found[:, 0].tolist() == [9.0, 0.0, 1.0, 9.0, 3.0, 4.0]


def test_without_an_order_of_time_nothing_is_shifted_or_previous(rng: np.random.Generator) -> None:
    evaluated = rows_of(rng.standard_normal((40, 3)), ordered=False, groups=())
    assert given_by(evaluated, "time_shifted") is None
    assert given_by(evaluated, "previous_sample") is None
    assert given_by(evaluated, "shuffled") is not None


def test_the_nearest_training_sample_is_that_of_the_plain_loop(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MOST_KEPT", 20)
    monkeypatch.setattr(training, "_CHUNK_BYTES", 4 * 6 * 7)
    inputs, shown = rng.standard_normal((90, 6)), rng.standard_normal((15, 6))
    has = rng.random(90) < 0.6
    train = [Sample(str(i), {"x": x}, {"m": np.full(2, i), **({"rare": np.full(2, i)} if h else {})})
             for i, (x, h) in enumerate(zip(inputs, has, strict=True))]  # fmt: skip
    test = [Sample(str(i), {"x": x}, {"m": np.zeros(2), "rare": np.zeros(2)}) for i, x in enumerate(shown)]
    modalities = [modality(2), modality(2, "rare")]
    looked = training.look_at_inputs(test, list(range(15)), 0, tmp_path)
    read = training.baselines_of(train, modalities, looked, tmp_path)
    apart = ((shown[:, None] - inputs[None]) ** 2).sum(axis=2)
    assert read.nearest["m"].tolist() == apart.argmin(axis=1).tolist()
    rare = np.where(has[None], apart, np.inf).argmin(axis=1)
    assert read.nearest["rare"].tolist() == rare.tolist()
    evaluated = rows_of(np.zeros((15, 2)), modality=modalities[1])
    every = simple_predictors(evaluated, list(range(15)), looked, read, train, tmp_path)
    (found,) = [p for p in every if p.name == "nearest_training_stimulus"]
    assert found.rows is not None
    assert np.asarray(found.rows[:])[:, 0].tolist() == rare.tolist()


def test_a_training_reference_with_other_inputs_is_a_reason_and_no_error(tmp_path: Path) -> None:
    test = [Sample("a", {"x": np.zeros(3)}, {"m": np.zeros(2)})]
    train = [Sample("b", {}, {"m": np.ones(2)})]
    looked = training.look_at_inputs(test, [0], 0, tmp_path)
    read = training.baselines_of(train, [modality(2)], looked, tmp_path)
    assert read.means["m"].tolist() == [1.0, 1.0]
    assert "in the training reference" in read.reason
    every = simple_predictors(rows_of(np.zeros((1, 2))), [0], looked, read, train, tmp_path)
    assert {p.name: p.reason for p in every}["ridge"] == read.reason


def test_a_modality_that_no_training_sample_has_is_the_reason_for_each_that_needs_it(tmp_path: Path) -> None:
    test = [Sample(str(i), {"x": np.full(3, i)}, {"m": np.zeros(2)}) for i in range(6)]
    train = [Sample(str(i), {"x": np.full(3, i)}, {}) for i in range(6)]
    looked = training.look_at_inputs(test, list(range(6)), 0, tmp_path)
    read = training.baselines_of(train, [modality(2)], looked, tmp_path)
    evaluated = rows_of(np.zeros((6, 2)), train_mean=read.means.get("m"))
    reasons = {p.name: p.reason for p in simple_predictors(evaluated, list(range(6)), looked, read, train, tmp_path)}
    assert reasons["train_mean"] == reasons["nearest_training_stimulus"] == "no training sample has this modality"
    assert "0 training samples have this modality" in reasons["ridge"]


class Encoding(AdapterBase):
    """Linear responses with noise to features in time; the checkpoint holds any linear map."""

    count, width, voxels, noise = 120, 6, 24, 0.5
    dependence = 2
    named: ClassVar[bool] = False

    def build_model(self, config: Any) -> nn.Module:
        return nn.Linear(self.width, self.voxels)

    def modalities(self, data: Any, config: Any) -> Any:
        return [modality(self.voxels)]

    def truth(self) -> Array:
        return np.random.default_rng(7).standard_normal((self.width, self.voxels))

    def samples(self, split: str, data: Any, config: Any) -> Any:
        generator = np.random.default_rng(len(split))
        shown = 40 if self.named else self.count
        x = np.tile(generator.standard_normal((shown, self.width)), (self.count // shown, 1))
        y = x @ self.truth() + self.noise * generator.standard_normal((self.count, self.voxels))
        return [Sample(f"{i}", self.inputs(x[i]), {"m": y[i]}, split, *self.names(i, shown)) for i in range(self.count)]

    def inputs(self, x: Array) -> Any:
        return {"x": x.astype(np.float32)}

    def names(self, index: int, shown: int) -> tuple[str, str]:
        return (f"clip{index % shown}", f"person{index // shown}") if self.named else ("", "")

    def train_reference(self, data: Any, config: Any) -> Any:
        return self.samples("train", data, config)

    def predict(self, model: Any, batch: Any) -> Any:
        return {"m": model(batch["x"])}


class Words(Encoding):
    """Inputs that only its own collate understands."""

    def inputs(self, x: Array) -> Any:
        return {"x": x.astype(np.float32), "words": "a tone"}

    def collate(self, samples: Any) -> Any:
        return {"x": torch.stack([torch.tensor(s.inputs["x"]) for s in samples])}


class Alone(Encoding):
    def train_reference(self, data: Any, config: Any) -> Any:
        return None


class Subjects(Encoding):
    named = True


class Repeats(Subjects):
    def names(self, index: int, shown: int) -> tuple[str, str]:
        return (f"clip{index % shown}", "")


def evaluate(folder: Path, adapter: type[Encoding], quality: float = 1.0) -> dict[str, Any]:
    model = nn.Linear(adapter.width, adapter.voxels)
    with torch.no_grad():
        model.weight.copy_(quality * torch.tensor(adapter().truth().T))
        model.bias.zero_()
    torch.save(model.state_dict(), folder / "model.pt")
    settings = EvaluationSettings(adapter=f"{__name__}:{adapter.__name__}", num_samples=0)
    plan = NodePlan(
        "r", "0" * 64, (JobSpec("reconstruct"),), str(folder / "model.pt"), settings, GpuPolicy("cpu"), OverrunPolicy()
    )
    run_job(JobContext(plan, "reconstruct", folder))
    found: dict[str, Any] = json.loads((folder / "reconstruct.json").read_text())
    return found


def metric(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(m) for m in document["metrics"] if m["id"] == name)


@pytest.mark.parametrize("adapter", [Encoding, Words, Alone])
def test_every_measured_metric_tells_of_every_baseline_a_value_or_why_not(
    tmp_path: Path, adapter: type[Encoding]
) -> None:
    document = evaluate(tmp_path, adapter)
    told = {b["name"]: b for b in document["baselines"]}
    assert set(told) == set(NAMES)
    assert all(b["measured"] == (b["reason"] is None) for b in told.values())
    for found in document["metrics"]:
        if found["value"] is not None:
            if found["details"].get("no_baselines"):
                assert found["baselines"] == {}
                continue
            assert set(found["baselines"]) == set(NAMES), found["id"]
            without = {n for n, v in found["baselines"].items() if v is None}
            assert without == set(found["details"].get("baselines_without_value", {})), found["id"]
    unavailable = {n for n, b in told.items() if not b["measured"]}
    by_inputs = {"ridge", "nearest_training_stimulus"}
    assert unavailable == {Encoding: set(), Words: by_inputs, Alone: {*by_inputs, "train_mean"}}[adapter]


def test_a_model_that_a_linear_map_beats_is_told_so_in_the_headline(tmp_path: Path) -> None:
    document = evaluate(tmp_path, Encoding, quality=0.6)
    mse = metric(document, "mse")
    assert mse["value"] < mse["baselines"]["train_mean"]
    assert "beats the train mean" in document["headline"]
    assert f"is worse than ridge regression ({mse['baselines']['ridge']:.4g})" in document["headline"]
    assert document["verdict"]["dimensions"]["task_evidence"] == "warn"
    (found,) = [f for f in document["findings"] if f["id"] == "task.worse_than_ridge"]
    assert found["severity"] == "warning"
    assert found["evidence"]["ridge"] == mse["baselines"]["ridge"]


def test_a_model_as_good_as_the_truth_is_told_nothing_of_the_kind(tmp_path: Path) -> None:
    document = evaluate(tmp_path, Encoding)
    assert document["verdict"]["dimensions"]["task_evidence"] == "pass"
    assert [f for f in document["findings"] if f["id"].startswith("task.")] == []
    assert metric(document, "voxelwise_correlation_mean")["baselines"]["ridge"] > 0.9


def test_repeats_and_subjects_of_the_samples_give_noise_ceilings(tmp_path: Path) -> None:
    by_repeats, by_subjects = "share_of_noise_ceiling_repeats", "share_of_noise_ceiling_subjects"
    folders = {a: tmp_path / a.__name__ for a in (Repeats, Subjects, Encoding)}
    for folder in folders.values():
        folder.mkdir()
    of_repeats = evaluate(folders[Repeats], Repeats)
    assert metric(of_repeats, by_repeats)["value"] == pytest.approx(1.0, abs=0.05)
    assert metric(of_repeats, by_subjects)["reason"]
    of_subjects = evaluate(folders[Subjects], Subjects)
    assert metric(of_subjects, by_subjects)["value"] == pytest.approx(1.0, abs=0.05)
    assert metric(of_subjects, by_repeats)["reason"]
    plain = evaluate(folders[Encoding], Encoding)
    assert "names no" in metric(plain, by_repeats)["reason"]
    assert "names no" in metric(plain, by_subjects)["reason"]


def test_samples_too_wide_for_all_pairs_have_a_null_all_the_same(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nulls, "_PRODUCTS", 1)
    targets = rng.standard_normal((200, 30))
    evaluated = rows_of(targets, predictions=(targets + rng.standard_normal((200, 30))).astype(np.float32))
    found = sample_metrics.similarity_metric(evaluated, "x").metric
    assert found.details["p"] < 0.05
    assert found.parameters["pairings"] >= 19


def test_the_null_from_all_pairs_is_the_null_of_each_pairing(rng: np.random.Generator) -> None:
    targets = rng.standard_normal((50, 30))
    evaluated = rows_of(targets, predictions=(targets + rng.standard_normal((50, 30))).astype(np.float32))
    every = [
        sample_metrics.sample_metric(
            evaluated, "x", statistics.row_correlations, "1", "higher", pairwise=pairwise
        ).metric
        for pairwise in (None, products.correlations)
    ]
    assert every[0].chance == pytest.approx(every[1].chance)
    assert every[0].details["p"] == every[1].details["p"]
