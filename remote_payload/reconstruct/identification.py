"""Identification: does a prediction resemble its own target more than it resembles the others."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.measured import HIGHER, Evaluated, Metric, defined, metric, unmeasured
from remote_payload.reconstruct.nulls import null_details, null_parameters, spacing
from remote_payload.reconstruct.products import Reordered, correlations
from remote_payload.reconstruct.statistics import Floats, RowsLike

_PAIRINGS = 60


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Who is compared with whom, chosen once for the model and every baseline.

    `rows` are the samples `(m,)`; `answers` `(u,)` the rows of the targets to choose from, one of each group of equal
    ones; `right` `(m,)` the place of a sample's own target among them; `allowed` `(m, u)` is False for targets too near
    in time to be a fair distractor. `step` is the distance in the split between neighbours of `rows`.
    """

    rows: NDArray[np.int64]
    answers: NDArray[np.int64]
    right: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    step: int


@dataclasses.dataclass(frozen=True)
class Identified:
    """`two_way` `(m,)`: share of the distractors that are less alike than the own target, ties half. `rank` `(m,)`: how
    many are more alike, ties half. NaN where nothing can be compared."""

    two_way: Floats
    rank: Floats


def identification_metrics(
    evaluated: Evaluated,
    prefix: str,
    given: RowsLike,
    wanted: RowsLike,
    baselines: Mapping[str, RowsLike],
    parameters: Mapping[str, Any],
    centre: Optional[Floats] = None,
    top: tuple[int, ...] = (),
    no_baselines: str = "",
) -> list[Metric]:
    """`PREFIX_two_way` and a `PREFIX_top_K` for each of `top`: Pearson over elements, after `centre` is removed.

    Chance is 0.5 for two-way and K over the number of candidates for top K; p comes from wrong pairings.
    """
    ids = [f"{prefix}_two_way", *(f"{prefix}_top_{k}" for k in top)]
    candidates = choose(evaluated, wanted)
    if not (candidates.allowed.sum(axis=1) > 1).any():
        reason = "no sample has a distractor: too few samples, or all too near in time or equal"
        return [unmeasured(evaluated, name, "share of pairs", HIGHER, reason) for name in ids]
    alike = similarities(given, wanted, candidates, centre)
    own = identify(alike, candidates)
    theirs = {n: identify(similarities(rows, wanted, candidates, centre), candidates) for n, rows in baselines.items()}
    block = -(-evaluated.dependence // candidates.step)
    how, indices = statistics.pairings(len(candidates.rows), block, evaluated.ordered, _PAIRINGS, evaluated.seed)
    wrong = [identify(alike, candidates, index) for index in indices]
    sizes = candidates.allowed.sum(axis=1)
    stated = {
        "similarity": "Pearson over elements",
        "samples": len(candidates.rows),
        "targets_to_choose_from": len(candidates.answers),
        "neighbours_left_out": evaluated.dependence if _in_time(evaluated) else 0,
        **parameters,
    }
    found = []
    for name, k in zip(ids, (0, *top)):
        value = _summary(own, k)
        null = None if value is None else statistics.null_from([_number(_summary(w, k)) for w in wrong], value, how)
        chance = 0.5 if k == 0 else float(np.minimum(k / sizes[sizes > 1], 1.0).mean())
        reached = {n: _summary(t, k) for n, t in theirs.items()}
        found.append(
            metric(
                evaluated,
                name,
                value,
                "share of pairs" if k == 0 else "share of samples",
                HIGHER,
                len(defined(own.two_way)),
                "predictions have no variance",
                chance=chance,
                interval=statistics.mean_interval(_per_sample(own, k), block, evaluated.seed),
                baselines=reached,
                parameters={**stated, **null_parameters(null)},
                details=null_details(null),
                no_baselines=no_baselines,
            )
        )
    return found


def choose(evaluated: Evaluated, wanted: RowsLike) -> Candidates:
    """Evenly spaced samples, as many as the cost allows; equal targets are one, and neighbours no distractors."""
    count, width = wanted.shape
    step = spacing(count, width)
    rows = np.arange(0, count, step)
    first: dict[Any, int] = {}
    member = np.empty(len(rows), dtype=np.int64)
    answers: list[int] = []
    for number, row in enumerate(rows):
        key: Any = hashlib.sha256(np.ascontiguousarray(wanted[row]).tobytes()).digest()
        if evaluated.stimuli and evaluated.stimuli[row]:
            key = evaluated.stimuli[row]
        if key not in first:
            first[key] = len(answers)
            answers.append(int(row))
        member[number] = first[key]
    near = _near(evaluated, rows)
    crowded = np.zeros((len(answers), len(rows)), dtype=bool)
    np.logical_or.at(crowded, member, near)
    allowed = ~crowded.T
    allowed[np.arange(len(rows)), member] = True
    return Candidates(rows, np.array(answers, dtype=np.int64), member, allowed, step)


def similarities(given: RowsLike, wanted: RowsLike, candidates: Candidates, centre: Optional[Floats] = None) -> Floats:
    """`(m, u)`: Pearson of each prediction with each target to choose from."""
    return correlations(Reordered(given, candidates.rows), Reordered(wanted, candidates.answers), centre)


def identify(alike: Floats, candidates: Candidates, index: Optional[NDArray[np.int64]] = None) -> Identified:
    """Two-way share and rank of the own target, or of that of sample `index[i]` instead (a wrong pairing)."""
    answers = candidates.right if index is None else candidates.right[index]
    allowed = candidates.allowed if index is None else candidates.allowed[index]
    places = np.arange(len(answers))
    own = alike[places, answers][:, None]
    rivals = allowed & np.isfinite(alike)
    rivals[places, answers] = False
    # Two sums of the same products in another order differ in the last bits: those are ties.
    closeness = alike - own
    more = (rivals & (closeness > 1e-12)).sum(axis=1)
    ties = (rivals & (np.abs(closeness) <= 1e-12)).sum(axis=1)
    count = rivals.sum(axis=1)
    comparable = np.isfinite(own[:, 0]) & (count > 0)
    rank = np.where(comparable, more + 0.5 * ties, np.nan)
    return Identified(np.where(comparable, 1.0 - rank / np.maximum(count, 1), np.nan), rank)


def _near(evaluated: Evaluated, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(m, m)`: samples nearer in time than data are independent, in one group."""
    if not _in_time(evaluated):
        return np.eye(len(rows), dtype=bool)
    near = np.abs(rows[:, None] - rows[None, :]) < max(1, evaluated.dependence)
    if evaluated.groups:
        groups = np.unique(np.array(evaluated.groups, dtype=np.str_), return_inverse=True)[1][rows]
        near &= groups[:, None] == groups[None, :]
    return np.asarray(near | np.eye(len(rows), dtype=bool))


def _in_time(evaluated: Evaluated) -> bool:
    return evaluated.ordered or evaluated.dependence > 1


def _per_sample(identified: Identified, k: int) -> Floats:
    if k == 0:
        return identified.two_way
    return np.asarray(np.where(np.isfinite(identified.rank), identified.rank < k, np.nan), dtype=np.float64)


def _summary(identified: Identified, k: int) -> Optional[float]:
    kept = defined(_per_sample(identified, k))
    return float(kept.mean()) if len(kept) else None


def _number(value: Optional[float]) -> float:
    return float("nan") if value is None else value
