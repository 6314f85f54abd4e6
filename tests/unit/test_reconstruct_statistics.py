from __future__ import annotations

import numpy as np
import pytest

from remote_payload.reconstruct import statistics


def test_row_correlations_agree_with_numpy() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 30, 50)).astype(np.float32)
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.astype(float), b.astype(float), strict=True)]
    np.testing.assert_allclose(statistics.row_correlations(a, b), expected, rtol=0, atol=1e-12)


def test_a_large_offset_does_not_spoil_a_correlation() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((1, 1000))
    r = statistics.row_correlations(a, a + 1e6 + generator.standard_normal((1, 1000)) * 1e-3)
    assert r[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e8, -3e-9])
def test_a_constant_row_has_no_correlation_rather_than_plus_or_minus_one(value: float) -> None:
    constant = np.full((1, 999), value, dtype=np.float32)
    assert np.isnan(statistics.row_correlations(constant, np.arange(999.0)[None])).all()
    assert np.isnan(statistics.row_correlations(constant, constant)).all()


def test_column_correlations_are_over_time_and_not_over_voxels() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 7))
    expected = [np.corrcoef(a[:, v], b[:, v])[0, 1] for v in range(7)]
    np.testing.assert_allclose(statistics.column_correlations(a, b), expected, atol=1e-12)


def test_correlations_in_another_order_are_those_of_the_reordered_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 7)) + 100.0
    a[:, 3] = 5.0
    indices = [generator.permutation(40) for _ in range(4)]
    expected = np.stack([statistics.column_correlations(a, b[i]) for i in indices])
    np.testing.assert_allclose(statistics.repaired_column_correlations(a, b, indices), expected, atol=1e-12)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 90)
    np.testing.assert_allclose(statistics.repaired_column_correlations(a, b, indices), expected, atol=1e-12)


def test_correlations_of_a_resample_are_those_of_the_resampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 7)) + 100.0
    a[:, 3] = 5.0
    indices = generator.integers(0, 40, (5, 40))
    expected = np.stack([statistics.column_correlations(a[i], b[i]) for i in indices])
    np.testing.assert_allclose(statistics.resampled_column_correlations(a, b, indices), expected, atol=1e-10)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 90)
    np.testing.assert_allclose(statistics.resampled_column_correlations(a, b, indices), expected, atol=1e-10)


def test_pieces_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 23, 11))
    whole = (
        statistics.row_correlations(a, b),
        statistics.column_correlations(a, b),
        statistics.row_errors(a, b),
        statistics.row_errors(a, b[0]),
    )
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 30)
    pieces = (
        statistics.row_correlations(a, b),
        statistics.column_correlations(a, b),
        statistics.row_errors(a, b),
        statistics.row_errors(a, b[0]),
    )
    for left, right in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-14)


def test_row_errors_are_mean_squared_differences() -> None:
    assert statistics.row_errors(np.array([[1.0, 3.0]]), np.array([[0.0, 0.0]])).tolist() == [5.0]


def test_shifts_of_a_time_series_stay_fifteen_samples_away_from_zero() -> None:
    how, indices = statistics.pairings(100, dependence=4, ordered=True, wanted=500, seed=0)
    shifts = sorted(int(i[0]) for i in indices)
    assert (shifts[0], shifts[-1]) == (15, 85)
    assert "15" in how
    assert all(sorted(i.tolist()) == list(range(100)) for i in indices)


def test_a_longer_dependence_widens_the_margin() -> None:
    _, indices = statistics.pairings(100, dependence=30, ordered=True, wanted=500, seed=0)
    assert min(int(i[0]) for i in indices) == 30


def test_a_series_too_short_to_shift_has_no_null() -> None:
    _, indices = statistics.pairings(21, dependence=10, ordered=True, wanted=60, seed=0)
    assert indices == []


def test_independent_samples_are_permuted() -> None:
    how, indices = statistics.pairings(12, dependence=1, ordered=False, wanted=40, seed=3)
    assert how == "permutation"
    assert len(indices) == 40
    assert all(sorted(i.tolist()) == list(range(12)) for i in indices)


def test_p_counts_the_observation_itself() -> None:
    null = statistics.null_from([0.0] * 99, 1.0, "x")
    assert null is not None
    assert null.p == pytest.approx(0.01)


def test_too_few_wrong_pairings_give_no_p() -> None:
    null = statistics.null_from([0.0] * 18, 1.0, "x")
    assert null is not None
    assert null.p is None


def test_p_is_about_uniform_when_there_is_nothing_to_find() -> None:
    """Autocorrelated series without relation: circular shifts keep p honest."""
    generator = np.random.default_rng(5)
    below = 0
    for trial in range(200):
        white = generator.standard_normal((2, 160))
        a, b = (np.convolve(w, np.ones(5) / 5, mode="same")[:, None] for w in white)
        how, indices = statistics.pairings(160, 5, True, 60, trial)
        observed = float(statistics.column_correlations(a, b)[0])
        null = statistics.null_of(
            lambda i, x=a, y=b: float(statistics.column_correlations(x, y[i])[0]), observed, how, indices
        )
        assert null is not None
        assert null.p is not None
        below += null.p < 0.05
    assert below <= 22


def test_an_interval_of_independent_values_is_that_of_their_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(4000)
    interval = statistics.mean_interval(values, block=1, seed=0)
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.15)


def test_blocks_widen_the_interval_of_dependent_values() -> None:
    values = np.repeat(np.random.default_rng(0).standard_normal(100), 10)
    naive = statistics.mean_interval(values, block=1, seed=0)
    blocks = statistics.mean_interval(values, block=20, seed=0)
    assert naive is not None
    assert blocks is not None
    assert blocks[1] - blocks[0] > 2 * (naive[1] - naive[0])


def test_fewer_than_three_blocks_give_no_interval() -> None:
    assert statistics.mean_interval(np.arange(29.0), block=10, seed=0) is None


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    assert statistics.mean_interval(values, 3, 7) == statistics.mean_interval(values, 3, 7)
