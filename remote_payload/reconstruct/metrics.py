"""The metrics of each kind of modality, each with its chance level, baselines and interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.measured import (
    HIGHER,
    LOWER,
    Evaluated,
    Evidence,
    Metric,
    error_metric,
    finite,
    mean_metric,
    metric,
    null_parameters,
    rows_alike,
    similarity_metric,
    similarity_name,
    with_baseline,
    wrong_pairings,
)
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.statistics import Floats
from remote_payload.reconstruct.voxel_metrics import measure_voxels


def measure(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """All metrics of the modality's kind and the evidence for its verdict."""
    kind = evaluated.modality.kind
    if kind is Kind.CODES:
        metrics, evidence = _codes(evaluated)
    elif kind is Kind.VOXELS:
        metrics, evidence = measure_voxels(evaluated)
    elif kind is Kind.TEXT_EMBEDDING:
        metrics, evidence = _embeddings(evaluated)
    else:
        metrics, evidence = _signals(evaluated)
    spread = spread_ratio(evaluated)
    metrics.append(
        metric(
            evaluated,
            "output_variance_ratio",
            spread,
            "1",
            HIGHER,
            len(evaluated.targets),
            reason="the targets do not vary over samples",
            parameters={"of": "variance over samples, mean over elements, predictions over targets"},
        )
    )
    return metrics, dataclasses.replace(evidence, spread=spread)


def sample_rows(evaluated: Evaluated) -> list[dict[str, Optional[float]]]:
    """What each single sample scores, for the per-sample file."""
    modality = evaluated.modality
    if modality.kind is Kind.CODES:
        hits = np.rint(evaluated.predictions) == np.rint(evaluated.targets)
        return [{"code_accuracy": float(h)} for h in hits.mean(axis=1)]
    mse = statistics.row_errors(evaluated.predictions, evaluated.targets)
    name, mean = similarity_name(modality.kind), np.zeros(1)
    if modality.kind in (Kind.VOXELS, Kind.TEXT_EMBEDDING):
        mean = evaluated.train_mean if evaluated.train_mean is not None else mean
    alike = rows_alike(modality.kind, evaluated.predictions - mean, evaluated.targets - mean)
    return [{"mse": finite(e), name: finite(r)} for e, r in zip(mse, alike)]


def spread_ratio(evaluated: Evaluated) -> Optional[float]:
    """Variance of the predictions over samples relative to the targets', None if those do not vary."""
    wanted = float(evaluated.targets.var(axis=0, dtype=np.float64).mean())
    given = float(evaluated.predictions.var(axis=0, dtype=np.float64).mean())
    return given / wanted if wanted > 0 else None


def _signals(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Image, video, mel and waveform: errors and the correlation of each sample over its own elements."""
    modality = evaluated.modality
    errors = statistics.row_errors(evaluated.predictions, evaluated.targets)
    error, gain = error_metric(evaluated, "mse", errors)
    name = similarity_name(modality.kind)
    similarity, null = similarity_metric(evaluated, name, evaluated.predictions, evaluated.targets)
    if evaluated.train_mean is not None:
        of_mean = statistics.row_correlations(
            np.broadcast_to(evaluated.train_mean, evaluated.targets.shape), evaluated.targets
        )
        similarity = with_baseline(similarity, "train_mean", of_mean)
    metrics = [error, similarity]
    if modality.kind in (Kind.IMAGE, Kind.VIDEO):
        metrics.append(_psnr(evaluated, errors))
    if modality.kind is Kind.AUDIO_WAVEFORM:
        metrics.append(mean_metric(evaluated, "si_sdr", _si_sdr(evaluated), "dB", HIGHER, "no finite ratio"))
    return metrics, Evidence(modality, len(errors), error, "train_mean", gain, similarity, null, None)


def _embeddings(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    errors = statistics.row_errors(evaluated.predictions, evaluated.targets)
    error, gain = error_metric(evaluated, "mse", errors)
    centre, source = evaluated.train_mean, "train mean"
    if centre is None:
        centre, source = evaluated.targets.mean(axis=0, dtype=np.float64), "mean of the evaluated targets"
    similarity, null = similarity_metric(
        evaluated,
        "centred_cosine",
        evaluated.predictions - centre,
        evaluated.targets - centre,
        {"centred_on": source},
    )
    return [similarity, error], Evidence(
        evaluated.modality, len(errors), error, "train_mean", gain, similarity, null, None
    )


def _codes(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    modality = evaluated.modality
    books_first = modality.layout == "KT"
    shape = (-1, *modality.shape)
    given = np.rint(evaluated.predictions).astype(np.int64).reshape(shape)
    wanted = np.rint(evaluated.targets).astype(np.int64).reshape(shape)
    if not books_first:
        given, wanted = given.swapaxes(1, 2), wanted.swapaxes(1, 2)
    hits = given == wanted
    commonest = np.array([np.bincount(wanted[:, k].ravel()).argmax() for k in range(len(wanted[0]))])
    frequency = (wanted == commonest[:, None]).mean(axis=(0, 2))
    constant = evaluated.commonest_codes
    constant_hits = None if constant is None else wanted == constant[:, None]
    accuracy = hits.mean(axis=(1, 2))
    how, indices = wrong_pairings(evaluated)
    null = statistics.null_of(lambda i: float((given == wanted[i]).mean()), float(accuracy.mean()), how, indices)
    overall = mean_metric(
        evaluated,
        "code_accuracy",
        accuracy,
        "share of codes",
        HIGHER,
        "",
        chance=float(frequency.mean()),
        baselines={} if constant_hits is None else {"train_commonest_code": float(constant_hits.mean())},
        parameters={"chance": "frequency of the commonest code of each book", **null_parameters(null)},
    )
    per_book = [
        mean_metric(
            evaluated,
            f"code_accuracy_codebook_{k}",
            hits[:, k].mean(axis=1),
            "share of codes",
            HIGHER,
            "",
            chance=float(frequency[k]),
            baselines={} if constant_hits is None else {"train_commonest_code": float(constant_hits[:, k].mean())},
            parameters={"codebook": k},
        )
        for k in range(len(wanted[0]))
    ]
    error, _ = error_metric(evaluated, "code_mse", statistics.row_errors(evaluated.predictions, evaluated.targets))
    gain = None
    if constant_hits is not None:
        gain = statistics.mean_interval(
            accuracy - constant_hits.mean(axis=(1, 2)), evaluated.dependence, evaluated.seed
        )
    evidence = Evidence(modality, len(accuracy), overall, "train_commonest_code", gain, overall, null, None)
    return [overall, *per_book, error], evidence


def _psnr(evaluated: Evaluated, errors: Floats) -> Metric:
    bounds = evaluated.modality.value_range
    if bounds is None:
        return metric(
            evaluated, "psnr", None, "dB", HIGHER, 0, reason="no range is declared, so there is no peak value"
        )
    peak = bounds[1] - bounds[0]
    baselines: dict[str, float] = {}
    with np.errstate(divide="ignore"):
        values = 10.0 * np.log10(peak**2 / errors)
        if evaluated.train_mean is not None:
            of_mean = 10.0 * np.log10(peak**2 / statistics.row_errors(evaluated.targets, evaluated.train_mean))
            if np.isfinite(of_mean).any():
                baselines["train_mean"] = float(of_mean[np.isfinite(of_mean)].mean())
    values = np.where(np.isfinite(values), values, np.nan)
    return mean_metric(
        evaluated,
        "psnr",
        values,
        "dB",
        HIGHER,
        "every sample is exact: infinite",
        baselines=baselines,
        parameters={"peak": peak},
    )


def _si_sdr(evaluated: Evaluated) -> Floats:
    """Scale-invariant signal-to-distortion ratio in dB of zero-mean signals (Le Roux et al., ICASSP 2019)."""
    given = evaluated.predictions.astype(np.float64)
    wanted = evaluated.targets.astype(np.float64)
    given -= given.mean(axis=1, keepdims=True)
    wanted -= wanted.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = (given * wanted).sum(axis=1) / (wanted**2).sum(axis=1)
        target = scale[:, None] * wanted
        ratio = 10.0 * np.log10((target**2).sum(axis=1) / ((target - given) ** 2).sum(axis=1))
    return np.asarray(np.where(np.isfinite(ratio), ratio, np.nan))


def not_measured(modality: Modality, reason: str) -> list[Metric]:
    """The modality's leading metric without a value, so that its absence is seen."""
    name = "code_accuracy" if modality.kind is Kind.CODES else "mse"
    direction = HIGHER if modality.kind is Kind.CODES else LOWER
    return [Metric(name, 1, modality.name, None, reason, modality.unit, 0, direction)]


def commonest_codes(modality: Modality, codes: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """The commonest code of each book `(K,)` among samples in the modality's layout."""
    stacked = np.rint(np.stack(codes)).astype(np.int64)
    by_book = stacked if modality.layout == "KT" else stacked.swapaxes(1, 2)
    return np.array([np.bincount(by_book[:, k].ravel()).argmax() for k in range(by_book.shape[1])])
