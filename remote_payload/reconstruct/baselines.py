"""What simple predictors give for the evaluated samples: the levels that a model is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.adapters import calling
from remote_payload.reconstruct.collect import allocate
from remote_payload.reconstruct.measured import NEAREST, PREVIOUS, RIDGE, SHIFTED, SHUFFLED, TRAIN_MEAN, Evaluated
from remote_payload.reconstruct.prediction import as_array
from remote_payload.reconstruct.products import Reordered
from remote_payload.reconstruct.protocol import Sample
from remote_payload.reconstruct.ridge import FEWEST, fit_ridge
from remote_payload.reconstruct.statistics import SHIFT_MARGIN, Floats, RowsLike, mean_over_rows
from remote_payload.reconstruct.training import Baselines, Shown

NAMES = (TRAIN_MEAN, SHUFFLED, SHIFTED, PREVIOUS, NEAREST, RIDGE)
_NO_REFERENCE = "the adapter gives no training reference"
_NO_MODALITY = "no training sample has this modality"
_NO_ORDER = "the samples are in no order of time (no `group`)"
_COLUMNS = 4096


@dataclasses.dataclass(frozen=True)
class Predictor:
    """One baseline of one modality: `rows` `(n, d)` beside the targets, or None and the reason.

    `facts` say what it is made of and what that depends on.
    """

    name: str
    rows: Optional[RowsLike]
    reason: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def simple_predictors(
    evaluated: Evaluated,
    positions: Sequence[int],
    shown: Optional[Shown],
    training: Optional[Baselines],
    reference: Optional[Sequence[Sample]],
    scratch: Path,
) -> list[Predictor]:
    """All of `NAMES` for one modality; `positions` are the samples of its rows in the split."""
    without_mean = _NO_REFERENCE if training is None else _NO_MODALITY
    found = [_mean(evaluated, without_mean), _shuffled(evaluated), _shifted(evaluated), _previous(evaluated, positions)]
    if training is None or reference is None or shown is None:
        return [*found, *(Predictor(name, None, _NO_REFERENCE) for name in (NEAREST, RIDGE))]
    rows = np.array([shown.positions[p] for p in positions], dtype=np.int64)
    return [
        *found,
        _nearest(evaluated, rows, training, reference, scratch),
        _ridge(evaluated, rows, shown, training, scratch),
    ]


def with_baselines(
    evaluated: Evaluated, predictors: Sequence[Predictor], training: Optional[Baselines] = None
) -> Evaluated:
    """The same rows with what the predictors give, why others give nothing, and the training targets that are kept."""
    name = evaluated.modality.name
    kept = None if training is None else Reordered(training.targets[name], np.flatnonzero(training.has[name]))
    return dataclasses.replace(
        evaluated,
        baselines={p.name: p.rows for p in predictors if p.rows is not None},
        no_baselines={p.name: p.reason for p in predictors if p.rows is None},
        training_targets=kept,
        copies=any(p.facts.get("targets_among_inputs") for p in predictors),
    )


def baseline_facts(modality: str, predictors: Sequence[Predictor]) -> list[dict[str, Any]]:
    """What results hold of them."""
    return [
        {"modality": modality, "name": p.name, "measured": p.rows is not None, "reason": p.reason or None, **p.facts}
        for p in predictors
    ]


def _mean(evaluated: Evaluated, reason: str) -> Predictor:
    if evaluated.train_mean is None:
        return Predictor(TRAIN_MEAN, None, reason)
    rows = np.broadcast_to(evaluated.train_mean, evaluated.targets.shape)
    return Predictor(TRAIN_MEAN, rows, facts={"gives": "the mean of the training targets"})


def _shuffled(evaluated: Evaluated) -> Predictor:
    count = len(evaluated.targets)
    if count < 2:
        return Predictor(SHUFFLED, None, "there is one sample")
    # One cycle through all samples: none keeps its own target.
    cycle = np.random.default_rng(evaluated.seed).permutation(count)
    order = np.empty(count, dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return Predictor(SHUFFLED, Reordered(evaluated.targets, order), facts={"gives": "another sample's target"})


def _shifted(evaluated: Evaluated) -> Predictor:
    if not evaluated.ordered:
        return Predictor(SHIFTED, None, _NO_ORDER)
    count, shift = len(evaluated.targets), max(SHIFT_MARGIN, evaluated.dependence)
    if count < 2 * shift:
        return Predictor(SHIFTED, None, f"{count} samples are too few to be shifted by {shift}")
    order = (np.arange(count) + shift) % count
    return Predictor(
        SHIFTED, Reordered(evaluated.targets, order), facts={"gives": "the target so many samples later", "by": shift}
    )


def _previous(evaluated: Evaluated, positions: Sequence[int]) -> Predictor:
    if not evaluated.ordered:
        return Predictor(PREVIOUS, None, _NO_ORDER)
    count = len(evaluated.targets)
    order = np.arange(count) - 1
    groups = np.array(evaluated.groups, dtype=np.str_)
    order[1:][groups[1:] != groups[:-1]] = -1
    firsts = int((order < 0).sum())
    if firsts == count:
        return Predictor(PREVIOUS, None, "no sample follows another")
    apart = np.diff(np.asarray(positions))[order[1:] >= 0]
    first = evaluated.train_mean if evaluated.train_mean is not None else mean_over_rows(evaluated.targets)
    facts = {
        "gives": "the target of the sample before; of a group's first the mean",
        "samples_apart": int(apart.max()),
        "without_one_before": firsts,
    }
    return Predictor(PREVIOUS, Reordered(evaluated.targets, order, first), facts=facts)


def _nearest(
    evaluated: Evaluated, rows: NDArray[np.int64], training: Baselines, reference: Sequence[Sample], scratch: Path
) -> Predictor:
    name = evaluated.modality.name
    if name not in training.nearest:
        return Predictor(NEAREST, None, training.reason)
    nearest = training.nearest[name][rows]
    if (nearest < 0).any():
        return Predictor(NEAREST, None, _NO_MODALITY)
    given = allocate(len(rows), evaluated.targets.shape[1], scratch)
    kept = {int(position): row for row, position in enumerate(training.kept)}
    for position in np.unique(nearest):
        if int(position) in kept:
            target = training.targets[name][kept[int(position)]]
        else:
            with calling("train_reference"):
                target = as_array(reference[int(position)].targets[name]).reshape(-1)
        given[nearest == position] = target
    equal = int((training.distance[name][rows] <= 1e-12).sum())
    facts = {
        "gives": "the target of the training sample whose input is nearest",
        "training_samples": training.samples,
        "equal_inputs": equal,
    }
    return Predictor(NEAREST, given, facts=facts)


def _ridge(
    evaluated: Evaluated, rows: NDArray[np.int64], shown: Shown, training: Baselines, scratch: Path
) -> Predictor:
    name = evaluated.modality.name
    if training.inputs is None or shown.features is None or shown.space is None:
        return Predictor(RIDGE, None, training.reason)
    usable = np.flatnonzero(training.has[name])
    if len(usable) < FEWEST:
        return Predictor(RIDGE, None, f"{len(usable)} training samples have this modality; {FEWEST} are needed")
    inputs, targets = Reordered(training.inputs, usable), Reordered(training.targets[name], usable)
    step = -(-training.samples // len(training.kept))
    block = -(-evaluated.dependence // step)
    fit = fit_ridge(inputs, targets, Reordered(shown.features, rows), block)
    if fit is None:
        return Predictor(RIDGE, None, "the inputs of the training samples do not vary")
    given = allocate(len(rows), evaluated.targets.shape[1], scratch)
    for start in range(0, given.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        wanted: Floats = np.asarray(targets[:, columns], dtype=np.float64)
        mean = wanted.mean(axis=0)
        given[:, columns] = mean + fit.weights @ (wanted - mean)
    facts = {
        "gives": "a linear regression from inputs to targets",
        "training_samples": len(usable),
        "penalty": fit.penalty,
        "penalty_chosen_by_leaving_out": fit.held_out,
        "targets_among_inputs": name in shown.holds,
        **shown.space.facts,
    }
    return Predictor(RIDGE, given, facts=facts)
