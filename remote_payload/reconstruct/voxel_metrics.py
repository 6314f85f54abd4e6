"""The metrics of voxels: correlation of a voxel over time, and of a volume over voxels, never mixed up."""

from __future__ import annotations

import io
from typing import Any, Callable, Optional

import numpy as np

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.identification import identification_metrics
from remote_payload.reconstruct.measured import (
    HIGHER,
    Evaluated,
    Evidence,
    Metric,
    baseline_rows,
    defined,
    metric,
    unmeasured,
)
from remote_payload.reconstruct.noise_ceiling import ceiling_metrics
from remote_payload.reconstruct.nulls import null_details, null_parameters, wrong_pairings
from remote_payload.reconstruct.sample_metrics import Scored, error_metric, evidence_beside_mean, similarity_metric
from remote_payload.reconstruct.statistics import Floats, Null

FDR = 0.05
_RESAMPLES = 200
_SHIFTED_VALUES = 30_000_000
_SUMMARIES: dict[str, Callable[[Floats], float]] = {
    "median": lambda r: float(np.median(r)),
    "mean": lambda r: float(np.mean(r)),
    "90th_percentile": lambda r: float(np.percentile(r, 90)),
}


def measure_voxels(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Two correlations that are not each other: of a voxel over time, and of a volume over voxels.

    The mean over voxels stands in the evidence: where a few regions respond, the median voxel need not.
    """
    error, gain = error_metric(evaluated, "mse")
    over_time = voxelwise_correlations(evaluated)
    how, indices = wrong_pairings(evaluated)
    most = max(19, _SHIFTED_VALUES // evaluated.targets.shape[1])
    indices = indices[:: -(-len(indices) // most)] if indices else []
    shifted = statistics.repaired_column_correlations(evaluated.predictions, evaluated.targets, indices)
    metrics, nulls = _summaries(evaluated, over_time, shifted, how)
    metrics.append(_significant_share(evaluated, over_time, shifted, how))
    pattern = pattern_correlation(evaluated)
    rest = [pattern.metric, error.metric, _explained(evaluated, error)]
    rest += identification_metrics(
        evaluated,
        "volume_identification",
        evaluated.predictions,
        evaluated.targets,
        baseline_rows(evaluated),
        {"removed_first": "train mean" if evaluated.train_mean is not None else "nothing"},
        evaluated.train_mean,
        (1,),
    )
    rest += ceiling_metrics(evaluated, over_time)
    leading = metrics[list(_SUMMARIES).index("mean")]
    evidence = evidence_beside_mean(evaluated, error, gain, leading, nulls["mean"])
    return [*metrics, *rest], evidence


def voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """Each voxel's correlation over time `(V,)`, NaN where prediction or target do not vary."""
    return statistics.column_correlations(evaluated.predictions, evaluated.targets)


def shifted_voxelwise_correlations(evaluated: Evaluated) -> Floats:
    """The same against wrong targets, all pairings in one array: the null band of the histogram."""
    _, indices = wrong_pairings(evaluated)
    return statistics.repaired_column_correlations(evaluated.predictions, evaluated.targets, indices[::6]).ravel()


def voxelwise_map(evaluated: Evaluated) -> bytes:
    """Each voxel's correlation over time as a `.npy` file: float32 `(V,)` in the order of the modality's voxels."""
    buffer = io.BytesIO()
    np.save(buffer, voxelwise_correlations(evaluated).astype("<f4"), allow_pickle=False)
    return buffer.getvalue()


def pattern_correlation(evaluated: Evaluated) -> Scored:
    """The mean over volumes of the correlation over voxels, after the train mean is taken from both."""
    centre = evaluated.train_mean
    source = "train mean" if centre is not None else "nothing: no training reference was given"
    stated = {"correlation": "of each volume over voxels", "removed_first": source}
    return similarity_metric(evaluated, "pattern_correlation", centre, stated)


def significant_voxels(over_time: Floats, shifted: Floats) -> tuple[Floats, Floats]:
    """`(V,)` adjusted p of each voxel and `(k,)` what share of voxels each wrong pairing would have called significant.

    A voxel's correlation and its correlations under `k` wrong pairings are standardised together (Fisher's z, mean and
    deviation over all k + 1), so that they are alike under the null; the tail is then that of all voxels' wrong
    pairings pooled, p = (1 + number at least as large) / (1 + number). Otherwise k pairings could not give the small p
    that a family of many thousand voxels asks for.
    """
    together = np.concatenate([over_time[None], shifted])
    z = np.arctanh(np.clip(together, -1 + 1e-12, 1 - 1e-12))
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (z - z.mean(axis=0)) / z.std(axis=0)
    pool = np.sort(z[1:][np.isfinite(z[1:])])

    def adjusted(row: Floats) -> Floats:
        at_least = len(pool) - np.searchsorted(pool, row, side="left")
        return statistics.benjamini_hochberg(np.where(np.isfinite(row), (1 + at_least) / (1 + len(pool)), np.nan))

    shares = [float((defined(adjusted(row)) < FDR).mean()) if np.isfinite(row).any() else 0.0 for row in z[1:21]]
    return adjusted(z[0]), np.array(shares)


def _summaries(
    evaluated: Evaluated, over_time: Floats, shifted: Floats, how: str
) -> tuple[list[Metric], dict[str, Optional[Null]]]:
    resampled = _resampled_columns(evaluated)
    has_variance = np.isfinite(over_time)
    theirs = {
        name: defined(statistics.column_correlations(rows, evaluated.targets))
        for name, rows in baseline_rows(evaluated).items()
    }
    metrics: list[Metric] = []
    nulls: dict[str, Optional[Null]] = {}
    for summary, function in _SUMMARIES.items():
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
                len(evaluated.targets),
                reason="no voxel varies over time in both prediction and target",
                chance=null.mean if null else None,
                interval=interval if value is not None else None,
                baselines={name: function(r) if len(r) else None for name, r in theirs.items()},
                parameters={
                    "correlation": "of each voxel over time",
                    "summary_over_voxels": summary,
                    **null_parameters(null),
                },
                details={
                    "voxels": int(has_variance.sum()),
                    "voxels_without_variance": int((~has_variance).sum()),
                    **null_details(null),
                },
            )
        )
    return metrics, nulls


def _significant_share(evaluated: Evaluated, over_time: Floats, shifted: Floats, how: str) -> Metric:
    name, unit = "voxelwise_correlation_significant_share", "share of voxels"
    if not np.isfinite(over_time).any():
        return unmeasured(evaluated, name, unit, HIGHER, "no voxel varies over time in both prediction and target")
    if len(shifted) < statistics.FEWEST_SHUFFLES:
        return unmeasured(evaluated, name, unit, HIGHER, "too few samples to pair them wrongly often enough")
    q, by_chance = significant_voxels(over_time, shifted)
    value = float((defined(q) < FDR).mean())
    null = statistics.null_from(by_chance.tolist(), value, how)
    stated: dict[str, Any] = {
        "correlation": "of each voxel over time",
        "false_discovery_rate": FDR,
        "correction": "Benjamini-Hochberg over voxels",
        "null": f"{how}, each voxel standardised, tails pooled over voxels",
        "pairings": len(shifted),
    }
    return metric(
        evaluated,
        name,
        value,
        unit,
        HIGHER,
        len(evaluated.targets),
        "",
        chance=float(by_chance.mean()),
        parameters=stated,
        details={"voxels": int(np.isfinite(q).sum()), **null_details(null)},
        no_baselines="significance is asked of the model alone",
    )


def _explained(evaluated: Evaluated, error: Scored) -> Metric:
    """1 - squared error / squared error of the train mean, over all volumes and voxels together."""
    name = "r2_against_train_mean"
    if evaluated.train_mean is None:
        return unmeasured(evaluated, name, "1", HIGHER, "no training reference was given")
    of_mean = statistics.row_errors(evaluated.targets, evaluated.train_mean)
    total = float(of_mean.mean())
    if not total > 0:
        return unmeasured(evaluated, name, "1", HIGHER, "the targets equal the train mean")
    interval = statistics.ratio_interval(error.values, of_mean, evaluated.dependence, evaluated.seed)
    chance = error.metric.chance
    return metric(
        evaluated,
        name,
        1.0 - float(error.values.mean()) / total,
        "1",
        HIGHER,
        len(of_mean),
        reason="",
        chance=None if chance is None else 1.0 - chance / total,
        interval=None if interval is None else (1.0 - interval[1], 1.0 - interval[0]),
        baselines={n: None if v is None else 1.0 - v / total for n, v in error.metric.baselines.items()},
        parameters={"over": "all volumes and voxels together", **null_parameters(error.null)},
        details={"p": error.null.p} if error.null else {},
    )


def _resampled_columns(evaluated: Evaluated) -> Floats:
    most = max(50, min(_RESAMPLES, _SHIFTED_VALUES // evaluated.targets.shape[1]))
    indices = statistics.block_indices(len(evaluated.targets), evaluated.dependence, evaluated.seed, most)
    if indices is None:
        return np.empty((0, evaluated.targets.shape[1]))
    return statistics.resampled_column_correlations(evaluated.predictions, evaluated.targets, indices)
