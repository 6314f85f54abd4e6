"""A metric as results hold it, and what metrics are computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.statistics import Floats, Null, RowsLike

if TYPE_CHECKING:
    from remote_payload.reconstruct.collapse import Collapse

HIGHER, LOWER = "higher", "lower"
TRAIN_MEAN, SHUFFLED, SHIFTED, PREVIOUS = "train_mean", "shuffled", "time_shifted", "previous_sample"
REARRANGED = (SHUFFLED, SHIFTED, PREVIOUS)
"""Baselines that give the evaluated targets themselves, in another order."""
NEAREST, RIDGE = "nearest_training_stimulus", "ridge"
RIVALS = (NEAREST, RIDGE)
"""Baselines that know the training data and the inputs: a model that loses to one has learnt less than it could."""
_VERSION = 2
"""Of every metric here: raised when the same id comes to mean another number."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number as results files hold it. `value` is None exactly if `reason` says why.

    `chance` is what predictions paired with the wrong targets come to; `baselines` what simple predictors reach on the
    same samples, None where `details` say why not. `parameters` decide what the number means: only runs with equal ones
    are compared. `details` came out beside the value (p, how many were undefined) and differ between runs.
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
    baselines: dict[str, Optional[float]] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """All evaluated samples of one modality: `targets` and `predictions` `(n, d)`, one sample a row.

    `train_mean` `(d,)` and `commonest_codes` `(k,)` come from the training reference, None without one. `ordered`: the
    samples are consecutive in time, at most across a few cuts. `baselines` holds what simple predictors give for the
    same samples `(n, d)`, by name, `no_baselines` why others give nothing; `copies`: the targets lie among the model's
    inputs, so that a linear baseline may copy them. `training_targets` `(k, d)` are some of training's.
    `latents` are the model's latents of targets and of predictions,
    each `(n, l)`.
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
    baselines: Mapping[str, RowsLike] = dataclasses.field(default_factory=dict)
    no_baselines: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: bool = False
    training_targets: Optional[RowsLike] = None
    latents: Optional[tuple[NDArray[Any], NDArray[Any]]] = None
    groups: tuple[str, ...] = ()
    stimuli: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the verdict on one modality rests on.

    `gain` is the 95 % interval of (baseline's error - model's error), sample by sample: above 0 the model is better.
    `rivals` are the same intervals beside baselines that a trained model should beat too; `copies` as in `Evaluated`.
    `null` belongs to the metric `similarity`. `collapse` is None until outputs were looked at as a set.
    """

    modality: Modality
    n: int
    error: Optional[Metric]
    baseline: str
    gain: Optional[tuple[float, float]]
    similarity: Optional[Metric]
    null: Optional[Null]
    collapse: Optional[Collapse] = None
    rivals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    copies: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows to score: predictions, targets, and what each baseline gives; not the declared ones where a metric derives
    its own."""

    given: RowsLike
    wanted: RowsLike
    baselines: Mapping[str, RowsLike]


def baseline_rows(evaluated: Evaluated) -> dict[str, RowsLike]:
    """Each baseline's predictions; the train mean among them wherever there is one."""
    rows: dict[str, RowsLike] = dict(evaluated.baselines)
    if evaluated.train_mean is not None and "train_mean" not in rows:
        rows["train_mean"] = np.broadcast_to(evaluated.train_mean, evaluated.targets.shape)
    return rows


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
    baselines: Optional[Mapping[str, Optional[float]]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
    details: Optional[Mapping[str, Any]] = None,
    no_baselines: str = "",
) -> Metric:
    """The metric. Baselines that the rows have and `baselines` lacks, or holds as None, are listed with the reason.

    `no_baselines` says why the metric has none at all.
    """
    told: dict[str, Optional[float]] = {}
    missing = {}
    if baselines is not None and not no_baselines:
        for known in (*baseline_rows(evaluated), *evaluated.no_baselines, *baselines):
            told[known] = baselines.get(known)
            if told[known] is None:
                missing[known] = evaluated.no_baselines.get(known, "it is undefined for every sample")
    return Metric(
        id=name,
        version=_VERSION,
        modality=evaluated.modality.name,
        value=value,
        reason=reason if value is None else None,
        unit=unit,
        n=n,
        direction=direction,
        chance=chance,
        interval=interval,
        baselines=told,
        parameters=dict(parameters or {}),
        details={
            **(details or {}),
            **({"baselines_without_value": missing} if missing else {}),
            **({"no_baselines": no_baselines} if no_baselines else {}),
        },
    )


def unmeasured(evaluated: Evaluated, name: str, unit: str, direction: str, reason: str) -> Metric:
    """The metric without a value, so that its absence is seen with its reason."""
    return metric(evaluated, name, None, unit, direction, 0, reason)


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
