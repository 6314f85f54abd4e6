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

_ELEMENTS_FOR_BOOTSTRAP = 400_000_000


def measure_voxels(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Two correlations that are not each other: of a voxel over time, and of a volume over voxels."""
    given, wanted = evaluated.predictions, evaluated.targets
    errors = statistics.row_errors(given, wanted)
    error, gain = error_metric(evaluated, "mse", errors)
    over_time = voxelwise_correlations(evaluated)
    metrics: list[Metric] = []
    how, indices = wrong_pairings(evaluated)
    shifted = [statistics.column_correlations(given, wanted[i]) for i in indices]
    resampled = _resampled_columns(evaluated)
    first_null: Optional[Null] = None
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
        first_null = first_null or null
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
    return [*metrics, pattern, error, *share], Evidence(
        evaluated.modality, len(wanted), error, "train_mean", gain, metrics[0], first_null, None
    )


def voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """Each voxel's correlation over time `(V,)`, NaN where prediction or target do not vary."""
    return statistics.column_correlations(evaluated.predictions, evaluated.targets)


def shifted_voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """The same against wrong targets, all pairings in one array: the null band of the histogram."""
    _, indices = wrong_pairings(evaluated)
    null = [statistics.column_correlations(evaluated.predictions, evaluated.targets[i]) for i in indices[::6]]
    return np.concatenate(null) if null else np.empty(0)


def _pattern_metric(evaluated: Evaluated) -> Metric:
    centre, source = evaluated.train_mean, "train mean"
    if centre is None:
        centre, source = np.zeros(1), "nothing: no training reference was given"
    metric, _ = similarity_metric(
        evaluated,
        "pattern_correlation",
        evaluated.predictions - centre,
        evaluated.targets - centre,
        {"correlation": "of each volume over voxels", "removed_first": source},
    )
    return metric


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


def _resampled_columns(evaluated: Evaluated) -> list[Floats]:
    resamples = int(np.clip(_ELEMENTS_FOR_BOOTSTRAP // max(1, evaluated.targets.size), 20, 200))
    indices = statistics.block_indices(len(evaluated.targets), evaluated.dependence, evaluated.seed, resamples)
    if indices is None:
        return []
    return [statistics.column_correlations(evaluated.predictions[i], evaluated.targets[i]) for i in indices]
