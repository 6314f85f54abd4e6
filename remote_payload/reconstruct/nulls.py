"""Nulls of metrics: what a score comes to when predictions are paired with the wrong targets."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import products, statistics
from remote_payload.reconstruct.measured import HIGHER, Evaluated, Source, defined
from remote_payload.reconstruct.products import Pairwise
from remote_payload.reconstruct.statistics import Floats, Null, Score

ELEMENTS_FOR_NULL = 2_000_000_000
_PAIRINGS = 60
_FEWEST_PAIRINGS = 20
_PRODUCTS = 20_000_000_000
_ELEMENTS = 100_000_000
_MOST_SAMPLES = 2000
_FEWEST_SAMPLES = 20


def null_of_score(
    evaluated: Evaluated, score: Score, source: Source, values: Floats, direction: str, elements: int
) -> tuple[Optional[Null], dict[str, Any]]:
    """The null by scoring each wrong pairing, of at most `elements` elements, and what it adds to the parameters."""
    count, width = source.wanted.shape
    wanted = int(np.clip(elements // max(1, count * width), _FEWEST_PAIRINGS, _PAIRINGS))
    how, indices = statistics.pairings(count, evaluated.dependence, evaluated.ordered, wanted, evaluated.seed)
    fits = max(1, elements // (wanted * width))
    rows = None if fits >= count else np.unique(np.linspace(0, count - 1, fits).round().astype(np.int64))
    kept = defined(values if rows is None else values[rows])
    sign = 1.0 if direction == HIGHER else -1.0
    wrong = []
    for index in indices:
        paired = defined(statistics.scores(score, source.given, source.wanted, index, rows))
        wrong.append(sign * float(paired.mean()) if len(paired) else float("nan"))
    null = statistics.null_from(wrong, sign * float(kept.mean()), how) if len(kept) else None
    if null is not None:
        null = dataclasses.replace(null, mean=sign * null.mean)
    return null, {} if rows is None else {"samples_in_null": len(rows)}


def null_of_pairs(
    evaluated: Evaluated, pairwise: Pairwise, source: Source, values: Floats, direction: str
) -> tuple[Optional[Null], dict[str, Any]]:
    """The null from the scores of all pairs at once, as `null_of_score`; None where there are too few to shift."""
    count, width = source.wanted.shape
    step = spacing(count, width)
    rows = np.arange(0, count, step)
    near = -(-evaluated.dependence // step)
    how, indices = statistics.pairings(len(rows), near, evaluated.ordered, _PAIRINGS, evaluated.seed)
    kept = defined(values[rows])
    # Of samples so wide that few are looked at, few can be shifted far enough: single pairings do better there.
    if len(indices) < statistics.FEWEST_SHUFFLES or not len(kept):
        return None, {}
    pairs = pairwise(products.Reordered(source.given, rows), products.Reordered(source.wanted, rows))
    sign = 1.0 if direction == HIGHER else -1.0
    wrong = []
    for index in indices:
        paired = defined(pairs[np.arange(len(rows)), index])
        wrong.append(sign * float(paired.mean()) if len(paired) else float("nan"))
    null = statistics.null_from(wrong, sign * float(kept.mean()), how)
    if null is not None:
        null = dataclasses.replace(null, mean=sign * null.mean)
    return null, {} if step == 1 else {"samples_in_null": len(rows)}


def spacing(count: int, width: int) -> int:
    """Every how many samples all pairs are looked at: as many as the cost allows."""
    most = int(np.clip(min((_PRODUCTS / width) ** 0.5, _ELEMENTS / width), _FEWEST_SAMPLES, _MOST_SAMPLES))
    return -(-count // most)


def wrong_pairings(evaluated: Evaluated) -> tuple[str, list[NDArray[np.int64]]]:
    """How pairings are broken for statistics of all samples at once, and the index arrays."""
    wanted = int(np.clip(ELEMENTS_FOR_NULL // max(1, evaluated.targets.size), _FEWEST_PAIRINGS, _PAIRINGS))
    return statistics.pairings(len(evaluated.targets), evaluated.dependence, evaluated.ordered, wanted, evaluated.seed)


def null_parameters(null: Optional[Null]) -> dict[str, Any]:
    if null is None:
        return {"null": "none: too few samples to pair them wrongly"}
    return {"null": null.how, "pairings": null.pairings}


def null_details(null: Optional[Null]) -> dict[str, Any]:
    return {} if null is None else {"p": null.p, "null_mean": null.mean}
