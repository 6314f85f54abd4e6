"""A metric as results hold it, what metrics are computed from, and the parts that all kinds share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.statistics import Floats, Null

HIGHER, LOWER = "higher", "lower"
_PAIRINGS = 60
_ELEMENTS_FOR_NULL = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number as results files hold it. `value` is None exactly if `reason` says why.

    `chance` is what predictions paired with the wrong targets come to; `baselines` what simple predictors reach on the
    same samples.
    """

    id: str
    version: int
    modality: str
    value: Optional[float]
    reason: Optional[str]
    unit: str
    n: int
    direction: str
    chance: Optional[float] = None
    interval: Optional[tuple[float, float]] = None
    baselines: dict[str, float] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """All evaluated samples of one modality: `targets` and `predictions` `(n, d)`, one sample a row.

    `train_mean` `(d,)` and `commonest_codes` `(k,)` come from the training reference, None without one. `ordered`: the
    samples are consecutive in time, at most across a few cuts. `baselines` holds what simple predictors give for the
    same samples `(n, d)`, by name. `latents` are the model's latents of targets and of predictions, each `(n, l)`.
    `groups`, `stimuli` and `subjects` name each row's group, what was presented and to whom, empty where nobody said:
    rows of one stimulus (and subject) are repeats.
    """

    modality: Modality
    targets: NDArray[np.float32]
    predictions: NDArray[np.float32]
    train_mean: Optional[Floats]
    commonest_codes: Optional[NDArray[np.int64]]
    ordered: bool
    dependence: int
    seed: int
    baselines: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    latents: Optional[tuple[NDArray[Any], NDArray[Any]]] = None
    groups: tuple[str, ...] = ()
    stimuli: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the verdict on one modality rests on.

    `gain` is the 95 % interval of (baseline's error - model's error), sample by sample: above 0 the model is better.
    `null` belongs to the metric `similarity`. `spread` is the predictions' variance over samples, relative to the
    targets'.
    """

    modality: Modality
    n: int
    error: Optional[Metric]
    baseline: str
    gain: Optional[tuple[float, float]]
    similarity: Optional[Metric]
    null: Optional[Null]
    spread: Optional[float]


def error_metric(evaluated: Evaluated, name: str, errors: Floats) -> tuple[Metric, Optional[tuple[float, float]]]:
    unit = f"{evaluated.modality.unit}²"
    baselines: dict[str, float] = {}
    gain = None
    if evaluated.train_mean is not None:
        of_mean = statistics.row_errors(evaluated.targets, evaluated.train_mean)
        baselines["train_mean"] = float(of_mean.mean())
        gain = statistics.mean_interval(of_mean - errors, evaluated.dependence, evaluated.seed)
    _, indices = wrong_pairings(evaluated)
    shuffled = [float(statistics.row_errors(evaluated.predictions, evaluated.targets[i]).mean()) for i in indices[:3]]
    metric = mean_metric(
        evaluated,
        name,
        errors,
        unit,
        LOWER,
        "",
        chance=float(np.mean(shuffled)) if shuffled else None,
        baselines=baselines,
    )
    return metric, gain


def similarity_metric(
    evaluated: Evaluated,
    name: str,
    given: NDArray[Any],
    wanted: NDArray[Any],
    parameters: Optional[Mapping[str, Any]] = None,
) -> tuple[Metric, Optional[Null]]:
    kind = evaluated.modality.kind
    alike = rows_alike(kind, given, wanted)
    how, indices = wrong_pairings(evaluated)
    observed = float(np.nanmean(alike)) if np.isfinite(alike).any() else float("nan")

    def paired(index: NDArray[np.int64]) -> float:
        wrong = rows_alike(kind, given, wanted[index])
        return float(np.nanmean(wrong)) if np.isfinite(wrong).any() else float("nan")

    null = statistics.null_of(paired, observed, how, indices) if np.isfinite(observed) else None
    metric = mean_metric(
        evaluated,
        name,
        alike,
        "1",
        HIGHER,
        "prediction or target has zero variance in every sample",
        chance=null.mean if null else None,
        parameters={**(parameters or {}), **null_parameters(null)},
    )
    return metric, null


def rows_alike(kind: Kind, given: NDArray[Any], wanted: NDArray[Any]) -> Floats:
    if kind is not Kind.TEXT_EMBEDDING:
        return statistics.row_correlations(given, wanted)
    a, b = given.astype(np.float64), wanted.astype(np.float64)
    norms = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(norms > 0, (a * b).sum(axis=1) / norms, np.nan))


def wrong_pairings(evaluated: Evaluated) -> tuple[str, list[NDArray[np.int64]]]:
    wanted = int(np.clip(_ELEMENTS_FOR_NULL // max(1, evaluated.targets.size), 20, _PAIRINGS))
    return statistics.pairings(len(evaluated.targets), evaluated.dependence, evaluated.ordered, wanted, evaluated.seed)


def null_parameters(null: Optional[Null]) -> dict[str, Any]:
    if null is None:
        return {"null": "none: too few samples to pair them wrongly"}
    return {"null": null.how, "pairings": null.pairings, "null_mean": null.mean, "p": null.p}


def mean_metric(
    evaluated: Evaluated,
    name: str,
    values: Floats,
    unit: str,
    direction: str,
    reason: str,
    chance: Optional[float] = None,
    baselines: Optional[dict[str, float]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
) -> Metric:
    """The mean over samples of what is defined, with its interval; how many were not is in the parameters."""
    kept = defined(values)
    more = {"undefined_samples": len(values) - len(kept)} if len(kept) < len(values) else {}
    return metric(
        evaluated,
        name,
        float(kept.mean()) if len(kept) else None,
        unit,
        direction,
        len(kept),
        reason=reason,
        chance=chance,
        interval=statistics.mean_interval(values, evaluated.dependence, evaluated.seed),
        baselines=baselines,
        parameters={**(parameters or {}), **more},
    )


def metric(
    evaluated: Evaluated,
    name: str,
    value: Optional[float],
    unit: str,
    direction: str,
    n: int,
    reason: str,
    chance: Optional[float] = None,
    interval: Optional[tuple[float, float]] = None,
    baselines: Optional[dict[str, float]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
) -> Metric:
    return Metric(
        id=name,
        version=1,
        modality=evaluated.modality.name,
        value=value,
        reason=reason if value is None else None,
        unit=unit,
        n=n,
        direction=direction,
        chance=chance,
        interval=interval,
        baselines=dict(baselines or {}),
        parameters=dict(parameters or {}),
    )


def with_baseline(metric: Metric, name: str, values: Floats) -> Metric:
    kept = defined(values)
    if not len(kept):
        return metric
    return dataclasses.replace(metric, baselines={**metric.baselines, name: float(kept.mean())})


def similarity_name(kind: Kind) -> str:
    return {
        Kind.IMAGE: "pixel_correlation",
        Kind.VIDEO: "pixel_correlation",
        Kind.MEL: "mel_correlation",
        Kind.AUDIO_WAVEFORM: "waveform_correlation",
        Kind.TEXT_EMBEDDING: "centred_cosine",
        Kind.VOXELS: "pattern_correlation",
    }[kind]


def defined(values: Floats) -> Floats:
    return np.asarray(values[np.isfinite(values)])


def finite(value: float) -> Optional[float]:
    return float(value) if np.isfinite(value) else None
