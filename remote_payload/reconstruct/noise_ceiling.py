"""How well any model could do, given how far the data repeat themselves; and what share of that the model reaches."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.measured import HIGHER, Evaluated, Metric, baseline_rows, metric, unmeasured
from remote_payload.reconstruct.statistics import Floats

LOWEST_CEILING = 0.1
"""Voxels whose ceiling is lower repeat nothing: a share of it would be noise over noise."""
_SPLITS = 20
_COLUMNS = 4096
_NAME = "share_of_noise_ceiling"


def ceiling_metrics(evaluated: Evaluated, over_time: Floats) -> list[Metric]:
    """Voxelwise correlation over time as a share of the ceiling, by repeats and by subjects; `over_time` is `(V,)`."""
    told = [(f"{_NAME}_repeats", _repeats(evaluated)), (f"{_NAME}_subjects", _subjects(evaluated))]
    return [_share(evaluated, name, ceiling, over_time) for name, ceiling in told]


def explainable_variance(responses: NDArray[Any], stimulus: NDArray[np.int64]) -> Floats:
    """`(V,)`: share of the variance of single responses `(n, V)` that their stimulus explains: ICC(1), unbiased.

    One-way random effects (Shrout & Fleiss 1979): (MSB - MSW) / (MSB + (k0 - 1) MSW). Stimuli seen once take no part.
    """
    sizes = np.bincount(stimulus)
    kept = sizes[stimulus] > 1
    values = responses[kept].astype(np.float64)
    _, member = np.unique(stimulus[kept], return_inverse=True)
    sizes = np.bincount(member).astype(np.float64)
    count, groups = len(values), len(sizes)
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, member, values)
    means = sums / sizes[:, None]
    between = (sizes[:, None] * (means - values.mean(axis=0)) ** 2).sum(axis=0) / (groups - 1)
    within = ((values - means[member]) ** 2).sum(axis=0) / (count - groups)
    usual = (count - (sizes**2).sum() / count) / (groups - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((between - within) / (between + (usual - 1.0) * within))


def spearman_brown(reliability: Floats, factor: float) -> Floats:
    """Reliability of `factor` times as many measurements (Spearman 1910, Brown 1910); below 0 it has no meaning."""
    return np.asarray(factor * reliability / (1.0 + (factor - 1.0) * reliability))


def _repeats(evaluated: Evaluated) -> tuple[Optional[Floats], str, str]:
    """Ceiling `(V,)`, how it was had, and why there is none."""
    if not any(evaluated.stimuli):
        return None, "", "the adapter names no repeated stimulus"
    who = evaluated.subjects or ("",) * len(evaluated.stimuli)
    keys = ["" if not s else f"{p}\0{s}" for p, s in zip(who, evaluated.stimuli)]
    stimulus = _numbered(keys)
    repeated = np.flatnonzero(np.bincount(stimulus) > 1)
    if len(repeated) < 3:
        return None, "", f"{len(repeated)} stimuli were presented more than once; three are needed"
    rows = np.flatnonzero(np.isin(stimulus, repeated))
    pieces = [
        explainable_variance(evaluated.targets[rows, start : start + _COLUMNS], stimulus[rows])
        for start in range(0, evaluated.targets.shape[1], _COLUMNS)
    ]
    variance = np.concatenate(pieces)
    return np.sqrt(np.maximum(variance, 0.0)), "root of the explainable variance of single responses, ICC(1)", ""


def _subjects(evaluated: Evaluated) -> tuple[Optional[Floats], str, str]:
    if not evaluated.subjects or not any(evaluated.stimuli):
        return None, "", "the adapter names no subjects who were presented the same stimuli"
    subjects, who = np.unique(np.array(evaluated.subjects, dtype=np.str_), return_inverse=True)
    stimulus = _numbered(list(evaluated.stimuli))
    table: dict[tuple[int, int], list[int]] = {}
    for row, (person, shown) in enumerate(zip(who, stimulus)):
        if evaluated.stimuli[row]:
            table.setdefault((int(person), int(shown)), []).append(row)
    shared = [s for s in range(int(stimulus.max()) + 1) if all((p, s) in table for p in range(len(subjects)))]
    if len(subjects) < 2 or len(shared) < 10:
        return (
            None,
            "",
            f"{len(shared)} stimuli were presented to all {len(subjects)} subjects; ten, to two, are needed",
        )
    pieces = []
    for start in range(0, evaluated.targets.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        responses = np.stack(
            [
                np.stack([evaluated.targets[table[p, s], columns].mean(axis=0, dtype=np.float64) for s in shared])
                for p in range(len(subjects))
            ]
        )
        pieces.append(split_half_reliability(responses, evaluated.seed))
    reliability = np.concatenate(pieces)
    return np.sqrt(np.maximum(reliability, 0.0)), "root of one subject's reliability, split halves, Spearman-Brown", ""


def split_half_reliability(responses: Floats, seed: int) -> Floats:
    """`(V,)`: one subject's reliability from responses `(subjects, stimuli, V)`.

    Random halves of the subjects are averaged and correlated over stimuli; the mean correlation over up to 20 splits is
    stepped down by Spearman-Brown from half the subjects to one.
    """
    subjects = len(responses)
    generator = np.random.default_rng(seed)
    half = subjects // 2
    found = []
    for _ in range(1 if subjects == 2 else _SPLITS):
        order = generator.permutation(subjects)
        first, second = responses[order[:half]].mean(axis=0), responses[order[half : 2 * half]].mean(axis=0)
        found.append(statistics.column_correlations(first, second))
    return spearman_brown(np.mean(found, axis=0), 1.0 / half)


def _share(evaluated: Evaluated, name: str, told: tuple[Optional[Floats], str, str], over_time: Floats) -> Metric:
    ceiling, how, reason = told
    if ceiling is None:
        return unmeasured(evaluated, name, "share of the ceiling", HIGHER, reason)
    used = np.isfinite(over_time) & np.isfinite(ceiling) & (ceiling >= LOWEST_CEILING)
    if not used.any():
        reason = f"no voxel that varies has a ceiling of {LOWEST_CEILING:g} or more"
        return unmeasured(evaluated, name, "share of the ceiling", HIGHER, reason)
    reached = float(ceiling[used].mean())
    theirs: dict[str, Optional[float]] = {}
    for baseline, rows in baseline_rows(evaluated).items():
        r = statistics.column_correlations(rows, evaluated.targets)[used]
        theirs[baseline] = float(r.mean()) / reached if np.isfinite(r).all() else None
    return metric(
        evaluated,
        name,
        float(over_time[used].mean()) / reached,
        "share of the ceiling",
        HIGHER,
        len(evaluated.targets),
        "",
        chance=0.0,
        baselines=theirs,
        parameters={
            "ceiling": how,
            "of": "mean voxelwise correlation over mean ceiling",
            "lowest_ceiling": LOWEST_CEILING,
        },
        details={"mean_ceiling": reached, "voxels": int(used.sum()), "voxels_left_out": int((~used).sum())},
    )


def _numbered(keys: list[str]) -> NDArray[np.int64]:
    """A number for each key; an empty key is like no other."""
    named = [key or f"\0{row}" for row, key in enumerate(keys)]
    return np.unique(np.array(named, dtype=object), return_inverse=True)[1].astype(np.int64)
