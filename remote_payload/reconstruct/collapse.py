"""Has the model collapsed: do outputs vary as targets do, differ from each other, and are they no mere copies."""

from __future__ import annotations

import dataclasses
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import products, statistics
from remote_payload.reconstruct.measured import HIGHER, LOWER, Evaluated, Metric, defined, metric, unmeasured
from remote_payload.reconstruct.nulls import spacing
from remote_payload.reconstruct.sample_metrics import pairwise_alike
from remote_payload.reconstruct.statistics import RowsLike

COPY_SHARE_OF_DISTANCE = 0.1
"""An output is a copy if its squared distance to a training target is less than this share of that to its own target,
and of that between its own target and the training target nearest to it."""
_PRODUCTS = 20_000_000_000
_ALONE = "collapse is asked of the model alone"


@dataclasses.dataclass(frozen=True)
class Collapse:
    """What the judgement looks at; None where it was not measured.

    `spread` is the outputs' variance over samples over the targets'; `alike` the mean correlation of one output with
    another, and of one target with another; `copied` the share of outputs that copy a training target.
    """

    spread: Optional[float]
    alike: Optional[tuple[float, float]]
    copied: Optional[float]


def collapse_metrics(evaluated: Evaluated) -> tuple[list[Metric], Collapse]:
    """Three metrics of outputs as a set, whatever single outputs score."""
    spread = spread_ratio(evaluated)
    varies = metric(
        evaluated,
        "output_variance_ratio",
        spread,
        "1",
        HIGHER,
        len(evaluated.targets),
        reason="the targets do not vary over samples",
        parameters={"of": "variance over samples, mean over elements, predictions over targets"},
        no_baselines=_ALONE,
    )
    likeness, alike = _pairwise_similarity(evaluated)
    copies = _copies(evaluated)
    return [varies, likeness, copies], Collapse(spread, alike, copies.value)


def spread_ratio(evaluated: Evaluated) -> Optional[float]:
    """Variance of the predictions over samples relative to the targets', None if those do not vary."""
    wanted = statistics.variance_over_rows(evaluated.targets)
    return statistics.variance_over_rows(evaluated.predictions) / wanted if wanted > 0 else None


def _pairwise_similarity(evaluated: Evaluated) -> tuple[Metric, Optional[tuple[float, float]]]:
    name = "output_pairwise_similarity"
    rows = np.arange(0, len(evaluated.targets), spacing(*evaluated.targets.shape))
    if len(rows) < 2:
        return unmeasured(evaluated, name, "1", LOWER, "there is one sample"), None
    compare = pairwise_alike(evaluated.modality.kind)
    given, wanted = (_mean_of_pairs(compare, r, rows) for r in (evaluated.predictions, evaluated.targets))
    found = metric(
        evaluated,
        name,
        given,
        "1",
        LOWER,
        len(rows),
        reason="no two outputs have variance over elements",
        parameters={"of": "mean over all pairs of samples", "samples": len(rows)},
        details={} if wanted is None else {"targets": wanted},
        no_baselines=_ALONE,
    )
    return found, None if given is None or wanted is None else (given, wanted)


def _mean_of_pairs(compare: products.Pairwise, rows: RowsLike, chosen: NDArray[np.int64]) -> Optional[float]:
    some = products.Reordered(rows, chosen)
    kept = defined(compare(some, some)[np.triu_indices(len(chosen), 1)])
    return float(kept.mean()) if len(kept) else None


def _copies(evaluated: Evaluated) -> Metric:
    """Share of the outputs that are, but for little, a training target instead of their own."""
    name, unit = "training_copies_share", "share of samples"
    training = evaluated.training_targets
    if training is None or not len(training):
        return unmeasured(evaluated, name, unit, LOWER, "no training targets were given")
    count, width = evaluated.targets.shape
    rows = np.arange(0, count, spacing(count, width))
    most = max(20, _PRODUCTS // (len(rows) * width))
    kept = np.unique(np.linspace(0, len(training) - 1, min(most, len(training))).round().astype(np.int64))
    known = products.Reordered(training, kept)
    given, wanted = (products.Reordered(r, rows) for r in (evaluated.predictions, evaluated.targets))
    to_training = products.mean_squared_errors(given, known).min(axis=1)
    of_targets = products.mean_squared_errors(wanted, known).min(axis=1)
    to_own = statistics.scores(statistics.squared_errors, given, wanted)
    copied = to_training < COPY_SHARE_OF_DISTANCE * np.minimum(to_own, of_targets)
    return metric(
        evaluated,
        name,
        float(copied.mean()),
        unit,
        LOWER,
        len(rows),
        "",
        parameters={
            "copy": f"nearer to a training target than {COPY_SHARE_OF_DISTANCE:g} of the squared distance to its own, "
            "and of its own to the training targets",
            "training_samples": len(kept),
        },
        details={"copies": int(copied.sum())},
        no_baselines=_ALONE,
    )
