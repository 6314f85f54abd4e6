"""The metrics of each kind of modality, each with its chance level, baselines and interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.audio_metrics import code_metrics, mel_metrics, waveform_metrics
from remote_payload.reconstruct.collapse import collapse_metrics
from remote_payload.reconstruct.feature_metrics import Extractor, feature_metrics
from remote_payload.reconstruct.image_metrics import image_metrics
from remote_payload.reconstruct.measured import HIGHER, LOWER, Evaluated, Evidence, Metric, finite, similarity_name
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.sample_metrics import alike, error_metric, evidence_beside_mean, similarity_metric
from remote_payload.reconstruct.text_metrics import embedding_metrics
from remote_payload.reconstruct.voxel_metrics import measure_voxels


def measure(evaluated: Evaluated, extractors: Sequence[Extractor] = ()) -> tuple[list[Metric], Evidence]:
    """All metrics of the modality's kind and the evidence for its verdict.

    `extractors` are the pretrained networks that the user named; what has no network is listed as not measured.
    """
    kind = evaluated.modality.kind
    if kind is Kind.CODES:
        metrics, evidence = code_metrics(evaluated)
    elif kind is Kind.VOXELS:
        metrics, evidence = measure_voxels(evaluated)
    elif kind is Kind.TEXT_EMBEDDING:
        metrics, evidence = embedding_metrics(evaluated)
    else:
        metrics, evidence = _signals(evaluated, extractors)
    as_a_set, collapse = collapse_metrics(evaluated)
    return with_adjusted_p(metrics) + as_a_set, dataclasses.replace(evidence, collapse=collapse)


def with_adjusted_p(metrics: Sequence[Metric]) -> list[Metric]:
    """Each metric that has a p with its q beside it: Benjamini-Hochberg over these metrics as one family."""
    p_values = np.array([float("nan") if m.details.get("p") is None else m.details["p"] for m in metrics])
    adjusted = statistics.benjamini_hochberg(p_values)
    return [
        dataclasses.replace(m, details={**m.details, "q": float(q)}) if np.isfinite(q) else m
        for m, q in zip(metrics, adjusted)
    ]


def sample_rows(evaluated: Evaluated) -> list[dict[str, Optional[float]]]:
    """What each single sample scores, for the per-sample file."""
    modality = evaluated.modality
    if modality.kind is Kind.CODES:
        hits = np.rint(evaluated.predictions) == np.rint(evaluated.targets)
        return [{"code_accuracy": float(h)} for h in hits.mean(axis=1)]
    mse = statistics.row_errors(evaluated.predictions, evaluated.targets)
    name = similarity_name(modality.kind)
    centre = evaluated.train_mean if modality.kind in (Kind.VOXELS, Kind.TEXT_EMBEDDING) else None
    similar = statistics.scores(alike(modality.kind, centre), evaluated.predictions, evaluated.targets)
    return [{"mse": finite(e), name: finite(r)} for e, r in zip(mse, similar)]


def _signals(evaluated: Evaluated, extractors: Sequence[Extractor]) -> tuple[list[Metric], Evidence]:
    """Image, video, mel and waveform: errors and the correlation of each sample over its own elements."""
    kind = evaluated.modality.kind
    error, gain = error_metric(evaluated, "mse")
    similarity = similarity_metric(evaluated, similarity_name(kind))
    metrics = [error.metric, similarity.metric]
    if kind in (Kind.IMAGE, Kind.VIDEO):
        metrics += image_metrics(evaluated) + feature_metrics(evaluated, extractors)
    elif kind is Kind.AUDIO_WAVEFORM:
        metrics += waveform_metrics(evaluated)
    else:
        metrics += mel_metrics(evaluated)
    evidence = evidence_beside_mean(evaluated, error, gain, similarity.metric, similarity.null)
    return metrics, evidence


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
