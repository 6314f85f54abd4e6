"""The metrics of voxels: correlation of a voxel over time, and of a volume over voxels, never mixed up."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.measured import (
    HIGHER,
    Evaluated,
    Evidence,
    Metric,
    defined,
    error_metric,
    metric,
    null_parameters,
    similarity_metric,
    wrong_pairings,
)
from remote_payload.reconstruct.statistics import Floats, Null

_RESAMPLES = 200


def measure_voxels(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Two correlations that are not each other: of a voxel over time, and of a volume over voxels.

    The mean over voxels stands in the evidence: where a few regions respond, the median voxel need not.
    """
    given, wanted = evaluated.predictions, evaluated.targets
    errors = statistics.row_errors(given, wanted)
    error, gain = error_metric(evaluated, "mse", errors)
    over_time = voxelwise_correlations(evaluated)
    metrics: list[Metric] = []
    how, indices = wrong_pairings(evaluated)
    shifted = statistics.repaired_column_correlations(given, wanted, indices)
    resampled = _resampled_columns(evaluated)
    nulls: dict[str, Optional[Null]] = {}
    summaries: dict[str, Callable[[Floats], float]] = {
        "median": lambda r: float(np.median(r)),
        "mean": lambda r: float(np.mean(r)),
        "90th_percentile": lambda r: float(np.percentile(r, 90)),
    }
    has_variance = np.isfinite(over_time)
    for summary, function in summaries.items():
        value = function(over_time[has_variance]) if has_variance.any() else None
        null = None
        if value is not None:
            null = statistics.null_from([function(defined(r)) for r in shifted if np.isfinite(r).any()], value, how)
        nulls[summary] = null
        values = [function(defined(r)) for r in resampled if np.isfinite(r).any()]
        interval = (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) if values else None
        metrics.append(
            metric(
                evaluated,
                f"voxelwise_correlation_{summary}",
                value,
                "1",
                HIGHER,
                len(wanted),
                reason="no voxel varies over time in both prediction and target",
                chance=null.mean if null else None,
                interval=interval if value is not None else None,
                parameters={
                    "correlation": "of each voxel over time",
                    "summary_over_voxels": summary,
                    "voxels": int(has_variance.sum()),
                    "voxels_without_variance": int((~has_variance).sum()),
                    **null_parameters(null),
                },
            )
        )
    pattern = _pattern_metric(evaluated)
    share = _explained(errors, evaluated)
    leading = metrics[list(summaries).index("mean")]
    evidence = Evidence(evaluated.modality, len(wanted), error, "train_mean", gain, leading, nulls["mean"], None)
    return [*metrics, pattern, error, *share], evidence


def voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """Each voxel's correlation over time `(V,)`, NaN where prediction or target do not vary."""
    return statistics.column_correlations(evaluated.predictions, evaluated.targets)


def shifted_voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """The same against wrong targets, all pairings in one array: the null band of the histogram."""
    _, indices = wrong_pairings(evaluated)
    return statistics.repaired_column_correlations(evaluated.predictions, evaluated.targets, indices[::6]).ravel()


def _pattern_metric(evaluated: Evaluated) -> Metric:
    centre, source = evaluated.train_mean, "train mean"
    if centre is None:
        centre, source = np.zeros(1), "nothing: no training reference was given"
    found, _ = similarity_metric(
        evaluated,
        "pattern_correlation",
        evaluated.predictions - centre,
        evaluated.targets - centre,
        {"correlation": "of each volume over voxels", "removed_first": source},
    )
    return found


def _explained(errors: Floats, evaluated: Evaluated) -> list[Metric]:
    if evaluated.train_mean is None:
        return []
    of_mean = float(statistics.row_errors(evaluated.targets, evaluated.train_mean).mean())
    value = 1.0 - float(errors.mean()) / of_mean if of_mean > 0 else None
    return [
        metric(
            evaluated,
            "r2_against_train_mean",
            value,
            "1",
            HIGHER,
            len(errors),
            reason="the targets equal the train mean",
            baselines={"train_mean": 0.0},
        )
    ]


def _resampled_columns(evaluated: Evaluated) -> Floats:
    indices = statistics.block_indices(len(evaluated.targets), evaluated.dependence, evaluated.seed, _RESAMPLES)
    if indices is None:
        return np.empty((0, evaluated.targets.shape[1]))
    return statistics.resampled_column_correlations(evaluated.predictions, evaluated.targets, indices)
