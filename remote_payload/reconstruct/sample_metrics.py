"""Metrics that are a mean over samples, each with its null, its interval and what the baselines reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from remote_payload.reconstruct import nulls, products, statistics
from remote_payload.reconstruct.measured import (
    HIGHER,
    LOWER,
    RIVALS,
    Evaluated,
    Evidence,
    Metric,
    Source,
    baseline_rows,
    defined,
    metric,
)
from remote_payload.reconstruct.products import Pairwise
from remote_payload.reconstruct.protocol import Kind
from remote_payload.reconstruct.statistics import Floats, Null, Rows, RowsLike, Score

_MODEL = ""
"""Stands for the model where it is scored beside its baselines."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A metric that is a mean over samples, with its null and each sample's own score `(n,)` (NaN: undefined), the
    model's and by baseline."""

    metric: Metric
    null: Optional[Null]
    values: Floats
    theirs: Mapping[str, Floats] = dataclasses.field(default_factory=dict)


def evidence_beside_mean(
    evaluated: Evaluated, error: Scored, gain: Optional[tuple[float, float]], similarity: Metric, null: Optional[Null]
) -> Evidence:
    """Evidence whose baseline is the train mean; collapse is not known yet."""
    return Evidence(
        evaluated.modality,
        len(evaluated.targets),
        error.metric,
        "train_mean",
        gain,
        similarity,
        null,
        None,
        rival_gains(evaluated, error, -1.0),
        evaluated.copies,
    )


def rival_gains(evaluated: Evaluated, scored: Scored, sign: float) -> dict[str, tuple[float, float]]:
    """The interval of what the model gains on each rival, sample by sample; `sign` -1 for errors, 1 for scores."""
    found = {}
    for name in RIVALS:
        if name in scored.theirs:
            gained = sign * (scored.values - scored.theirs[name])
            interval = statistics.mean_interval(gained, evaluated.dependence, evaluated.seed)
            if interval is not None:
                found[name] = interval
    return found


def source_of(evaluated: Evaluated) -> Source:
    return Source(evaluated.predictions, evaluated.targets, baseline_rows(evaluated))


def sample_metric(
    evaluated: Evaluated,
    name: str,
    score: Score,
    unit: str,
    direction: str,
    reason: str = "",
    parameters: Optional[Mapping[str, Any]] = None,
    source: Optional[Source] = None,
    null_elements: int = nulls.ELEMENTS_FOR_NULL,
    pairwise: Optional[Pairwise] = None,
) -> Scored:
    """The mean over samples of `score`, with every baseline's, the null of wrong pairings and a bootstrap interval.

    The null looks at no more than `null_elements` elements: of a large split it takes spaced samples and says so. Where
    `pairwise` gives the same score of all pairs at once, the null comes from that.
    """
    source = source or source_of(evaluated)
    count = len(source.wanted)
    theirs = statistics.scores_of_each(score, {_MODEL: source.given, **source.baselines}, source.wanted)
    values = theirs.pop(_MODEL)
    kept = defined(values)
    null: Optional[Null] = None
    more: dict[str, Any] = {}
    if len(kept) and pairwise is not None:
        null, more = nulls.null_of_pairs(evaluated, pairwise, source, values, direction)
    if len(kept) and null is None:
        null, more = nulls.null_of_score(evaluated, score, source, values, direction, null_elements)
    baselines = {name: float(defined(found).mean()) if len(defined(found)) else None for name, found in theirs.items()}
    found = metric(
        evaluated,
        name,
        float(kept.mean()) if len(kept) else None,
        unit,
        direction,
        len(kept),
        reason=reason or "it is undefined for every sample",
        chance=null.mean if null else None,
        interval=statistics.mean_interval(values, evaluated.dependence, evaluated.seed),
        baselines=baselines,
        parameters={**(parameters or {}), **nulls.null_parameters(null), **more},
        details={**nulls.null_details(null), **({"undefined_samples": count - len(kept)} if len(kept) < count else {})},
    )
    return Scored(found, null, values, theirs)


def error_metric(evaluated: Evaluated, name: str) -> tuple[Scored, Optional[tuple[float, float]]]:
    """Mean squared error, and the interval of what it gains on the train mean sample by sample."""
    scored = sample_metric(
        evaluated,
        name,
        statistics.squared_errors,
        f"{evaluated.modality.unit}²",
        LOWER,
        pairwise=products.mean_squared_errors,
    )
    gain = None
    if evaluated.train_mean is not None:
        of_mean = statistics.row_errors(evaluated.targets, evaluated.train_mean)
        gain = statistics.mean_interval(of_mean - scored.values, evaluated.dependence, evaluated.seed)
    return scored, gain


def similarity_metric(
    evaluated: Evaluated,
    name: str,
    centre: Optional[Floats] = None,
    parameters: Optional[Mapping[str, Any]] = None,
    source: Optional[Source] = None,
) -> Scored:
    """How alike each prediction and its target are, after `centre` `(d,)` is taken from both."""
    return sample_metric(
        evaluated,
        name,
        alike(evaluated.modality.kind, centre),
        "1",
        HIGHER,
        "prediction or target has zero variance in every sample",
        parameters,
        source,
        pairwise=pairwise_alike(evaluated.modality.kind, centre),
    )


def pairwise_alike(kind: Kind, centre: Optional[Floats] = None) -> Pairwise:
    """`alike` of all pairs at once."""
    compare = products.cosines if kind is Kind.TEXT_EMBEDDING else products.correlations

    def score(given: RowsLike, wanted: RowsLike) -> Floats:
        return compare(given, wanted, centre)

    return score


def alike(kind: Kind, centre: Optional[Floats] = None) -> Score:
    """Cosine for embeddings, Pearson over a sample's elements for all others; of both less `centre`."""
    compare = _cosines if kind is Kind.TEXT_EMBEDDING else statistics.row_correlations

    def score(given: Rows, wanted: Rows) -> Floats:
        return compare(given, wanted) if centre is None else compare(given - centre, wanted - centre)

    return score


def _cosines(given: Rows, wanted: Rows) -> Floats:
    a, b = given.astype(np.float64), wanted.astype(np.float64)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(norms > 0, (a * b).sum(axis=1) / norms, np.nan))
