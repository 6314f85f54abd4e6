"""Is p uniform where nothing is to be found? On real resting-state series, which the package nitime carries."""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.voxel_metrics import significant_voxels
from remote_payload.reference.film import packaged_file

Series = NDArray[np.float64]


def regions() -> Series:
    """`(250, 28)`: the mean series of grey-matter regions in one scan at rest."""
    table = np.genfromtxt(packaged_file("nitime", "fmri_timeseries.csv"), delimiter=",", skip_header=1)
    return np.asarray(table[:, 3:])


def independent_predictions() -> tuple[Series, Series]:
    """840 null pairs: a real series, and noise of its own with the autocorrelation (AR 2) of a real region.

    The noise is drawn anew for each pair, so that the p values are independent and a KS test of them is valid.
    """
    table, generator = regions(), np.random.default_rng(0)
    count = len(table)

    def noise_like(series: Series) -> Series:
        x = (series - series.mean()) / series.std()
        r = [float((x[lag:] * x[: count - lag]).mean()) for lag in range(3)]
        a = np.linalg.solve([[r[0], r[1]], [r[1], r[0]]], r[1:])
        drawn = scipy.signal.lfilter([1], [1, -a[0], -a[1]], generator.standard_normal(count + 200))
        return np.asarray(drawn[200:])

    pairs = [
        (noise_like(table[:, generator.integers(table.shape[1])]), table[:, region])
        for region in range(table.shape[1])
        for _ in range(30)
    ]
    return np.array([p[0] for p in pairs]).T, np.array([p[1] for p in pairs]).T


def halves_of_the_scan() -> tuple[Series, Series]:
    """`(125, 756)` twice: a region in the first half of the scan and another in the second; both real.

    The pairs share 28 series, so their p values depend on each other and no KS test of them is valid.
    """
    table = regions()
    half = len(table) // 2
    pairs = [(i, j) for i in range(table.shape[1]) for j in range(table.shape[1]) if i != j]
    first, second = np.array(pairs).T
    return table[:half, first], table[half:, second]


def p_of(first: Series, second: Series, indices: list[NDArray[np.int64]]) -> Series:
    observed = statistics.column_correlations(first, second)
    wrong = statistics.repaired_column_correlations(first, second, indices)
    found = [statistics.null_from(wrong[:, k].tolist(), observed[k], "") for k in range(len(observed))]
    return np.array([n.p for n in found if n is not None and n.p is not None])


def shifts_of(series: Series) -> list[NDArray[np.int64]]:
    return statistics.pairings(len(series), 15, True, 1000, 0)[1]


def permutations_of(series: Series) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(1)
    return [generator.permutation(len(series)) for _ in shifts_of(series)]


def parametric_p(first: Series, second: Series) -> Series:
    pairs = zip(first.T, second.T, strict=True)
    return np.array([scipy.stats.pearsonr(a, b, alternative="greater").pvalue for a, b in pairs])


def test_p_by_circular_shifts_is_uniform_on_real_series_and_the_naive_p_is_not() -> None:
    first, second = independent_predictions()
    assert scipy.stats.kstest(p_of(first, second, shifts_of(first)), "uniform").pvalue > 0.05
    assert scipy.stats.kstest(p_of(first, second, permutations_of(first)), "uniform").pvalue < 1e-4
    assert scipy.stats.kstest(parametric_p(first, second), "uniform").pvalue < 1e-4


def test_between_halves_of_a_real_scan_only_the_naive_tests_are_significant_too_often() -> None:
    first, second = halves_of_the_scan()
    assert (p_of(first, second, shifts_of(first)) < 0.05).mean() <= 0.05
    assert (p_of(first, second, permutations_of(first)) < 0.05).mean() > 0.07
    assert (parametric_p(first, second) < 0.05).mean() > 0.07


def test_no_voxel_of_unrelated_real_series_is_significant_after_correction() -> None:
    first, second = halves_of_the_scan()
    shifts = statistics.pairings(len(first), 15, True, 60, 0)[1]
    observed = statistics.column_correlations(first, second)
    q, _ = significant_voxels(observed, statistics.repaired_column_correlations(first, second, shifts))
    assert not (q < 0.05).any()
    assert (scipy.stats.false_discovery_control(parametric_p(first, second)) < 0.05).any()
