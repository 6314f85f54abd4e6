"""A metric as results hold it, what metrics are computed from, and the parts that all kinds share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import products, statistics
from remote_payload.reconstruct.products import Pairwise
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.statistics import Floats, Null, Rows, RowsLike, Score

if TYPE_CHECKING:
    from remote_payload.reconstruct.collapse import Collapse

HIGHER, LOWER = "higher", "lower"
TRAIN_MEAN, SHUFFLED, SHIFTED, PREVIOUS = "train_mean", "shuffled", "time_shifted", "previous_sample"
REARRANGED = (SHUFFLED, SHIFTED, PREVIOUS)
"""Baselines that give the evaluated targets themselves, in another order."""
NEAREST, RIDGE = "nearest_training_stimulus", "ridge"
RIVALS = (NEAREST, RIDGE)
"""Baselines that know the training data and the inputs: a model that loses to one has learnt less than it could."""
_MODEL = ""
"""Stands for the model where it is scored beside its baselines."""
_PAIRINGS = 60
_FEWEST_PAIRINGS = 20
_VERSION = 2
"""Of every metric here: raised when the same id comes to mean another number."""
_ELEMENTS_FOR_NULL = 2_000_000_000
_PRODUCTS = 20_000_000_000
_ELEMENTS = 100_000_000
_MOST_SAMPLES = 2000
_FEWEST_SAMPLES = 20


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


def baseline_rows(evaluated: Evaluated) -> dict[str, RowsLike]:
    """Each baseline's predictions; the train mean among them wherever there is one."""
    rows: dict[str, RowsLike] = dict(evaluated.baselines)
    if evaluated.train_mean is not None and "train_mean" not in rows:
        rows["train_mean"] = np.broadcast_to(evaluated.train_mean, evaluated.targets.shape)
    return rows


def sample_metric(
    evaluated: Evaluated,
    name: str,
    score: Score,
    unit: str,
    direction: str,
    reason: str = "",
    parameters: Optional[Mapping[str, Any]] = None,
    source: Optional[Source] = None,
    null_elements: int = _ELEMENTS_FOR_NULL,
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
        null, more = _null_of_pairs(evaluated, pairwise, source, values, direction)
    if len(kept) and null is None:
        null, more = _null_of_score(evaluated, score, source, values, direction, null_elements)
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
        parameters={**(parameters or {}), **null_parameters(null), **more},
        details={**null_details(null), **({"undefined_samples": count - len(kept)} if len(kept) < count else {})},
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


def _null_of_score(
    evaluated: Evaluated, score: Score, source: Source, values: Floats, direction: str, elements: int
) -> tuple[Optional[Null], dict[str, Any]]:
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


def _null_of_pairs(
    evaluated: Evaluated, pairwise: Pairwise, source: Source, values: Floats, direction: str
) -> tuple[Optional[Null], dict[str, Any]]:
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
    wanted = int(np.clip(_ELEMENTS_FOR_NULL // max(1, evaluated.targets.size), _FEWEST_PAIRINGS, _PAIRINGS))
    return statistics.pairings(len(evaluated.targets), evaluated.dependence, evaluated.ordered, wanted, evaluated.seed)


def null_parameters(null: Optional[Null]) -> dict[str, Any]:
    if null is None:
        return {"null": "none: too few samples to pair them wrongly"}
    return {"null": null.how, "pairings": null.pairings}


def null_details(null: Optional[Null]) -> dict[str, Any]:
    return {} if null is None else {"p": null.p, "null_mean": null.mean}


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
