"""What the file's own figures say about the task. They can fail it; they never pass it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role
from remote_payload.health.checks.check import Check
from remote_payload.health.checks.losses import dominant_part, loss_parts
from remote_payload.health.facts import HealthFacts
from remote_payload.health.run_config import run_config
from remote_payload.health.training_record import Series, held_out_loss, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_CORRELATION = re.compile(r"corr|pearson|spearman", re.IGNORECASE)
_ACCURACY = re.compile(r"(^|[._])(acc|accuracy|top_?1)([._]|$)", re.IGNORECASE)
_EXPLAINED = re.compile(r"(^|[._])(r2|r_squared|rsquared|r2_score|explained_variance)([._]|$)", re.IGNORECASE)
_CODES = re.compile(r"audio|code|token", re.IGNORECASE)
_ERROR = re.compile(r"loss|error|mse|mae|l1|recon", re.IGNORECASE)
_ABSOLUTE = re.compile(r"mae|l1", re.IGNORECASE)
_BRAIN = re.compile(r"voxel|fmri|bold", re.IGNORECASE)

_AT_CHANCE = 0.02
"""Correlations of smooth, autocorrelated signals scatter around 0 by about this much even over many samples."""
_DEPENDENT_FEWEST, _DEPENDENT_MOST = 40, 2500
"""Measurements of fMRI that are worth one independent one: 8 to 500 voxels in a resolution element after smoothing,
5 volumes in a correlation time of the haemodynamic response (about 8 s)."""
_USUAL_CODEBOOK = 1024
"""Entries of a codebook of the common neural audio codecs."""
_PLAUSIBLE = 1e9
_LIKE_CONSTANT = (0.85, 1.1)


def _correlations(facts: HealthFacts) -> list[Series]:
    return [s for s in training_record(facts.header).series if s.held_out and _CORRELATION.search(s.name)]


def _chance_level(facts: HealthFacts) -> Iterator[Finding]:
    for series in _correlations(facts):
        best = max(series.values, key=abs)
        if abs(best) >= _AT_CHANCE:
            continue
        size = _sample_size(facts.header, series)
        yield _finding(
            "task.chance_level",
            f"{series.name[:100]} never left chance: {series.values[-1]:.4g} at the end",
            series,
            {
                "last": series.values[-1],
                "furthest_from_zero": best,
                "chance": 0.0,
                "threshold": _AT_CHANCE,
                "epochs": len(series.values),
                **_scatter(series),
                **size,
            },
            "A correlation this close to 0 is what a predictor that knows nothing gets. Counting every voxel and "
            "volume as independent makes it look significant; neighbours in space and time are not independent."
            + _significance(size)
            + " It may also be a pattern correlation across the voxels of a volume, which is not the voxelwise "
            "correlation over time that the field reports.",
            "A permutation test that keeps the autocorrelation, on held-out data, above chance.",
            0.85,
        )
    yield from _accuracy_at_chance(facts)


def _scatter(series: Series) -> dict[str, float]:
    """How much the figure moves from one epoch to the next, which is no learning when it goes back and forth."""
    if len(series.values) < 3:
        return {}
    steps = [b - a for a, b in zip(series.values, series.values[1:])]
    return {"scatter_between_epochs": math.sqrt(sum(s * s for s in steps) / (2 * len(steps)))}


def _sample_size(header: CheckpointHeader, series: Series) -> dict[str, Any]:
    """Standard errors of the last value, naive and honest, as far as the file says how much was measured."""
    voxels = _voxels(header) if _BRAIN.search(series.name) else None
    volumes = run_config(header).number("volumes")
    if not voxels or not 0 < voxels < _PLAUSIBLE:
        return {}
    if not volumes or not 1 <= volumes < _PLAUSIBLE:
        return {"voxels": voxels, "volumes": None}
    naive = 1 / math.sqrt(voxels * volumes)
    least, most = naive * math.sqrt(_DEPENDENT_FEWEST), naive * math.sqrt(_DEPENDENT_MOST)
    last = abs(series.values[-1])
    return {
        "voxels": voxels,
        "volumes": int(volumes),
        "naive_standard_error": naive,
        "naive_z": last / naive,
        "honest_standard_error": [least, most],
        "honest_z": [last / most, last / least],
    }


def _significance(size: dict[str, Any]) -> str:
    if "naive_z" in size:
        low, high = size["honest_z"]
        return (
            f" With {size['voxels']:,} voxels and {size['volumes']:,} volumes taken as independent it is "
            f"{size['naive_z']:.1f} standard errors from 0; with smoothing and autocorrelation allowed for, "
            f"{low:.1f} to {high:.1f}."
        )
    if "voxels" in size:
        return f" The file has {size['voxels']:,} voxels and does not say how many volumes: its error is not measured."
    return ""


def _voxels(header: CheckpointHeader) -> Optional[int]:
    stated = run_config(header).number("voxels")
    if stated:
        return int(stated)
    heads = [t.shape[0] for t in header.model_tensors() if t.role is Role.WEIGHT_MATRIX and _BRAIN.search(t.name)]
    return max(heads, default=None)


def _accuracy_at_chance(facts: HealthFacts) -> Iterator[Finding]:
    classes = run_config(facts.header).number("classes")
    if not classes or classes < 2:
        return
    chance = 1 / classes
    for series in training_record(facts.header).series:
        if not series.held_out or not _ACCURACY.search(series.name):
            continue
        values = [v / 100 for v in series.values] if max(series.values) > 1 else list(series.values)
        best = max(values)
        if best - chance < min(0.02, 0.5 * chance):
            yield _finding(
                "task.chance_level",
                f"{series.name[:100]} never left chance: {best:.4g} at best, {chance:.4g} by guessing",
                series,
                {"best": best, "last": values[-1], "chance": chance, "classes": int(classes), "epochs": len(values)},
                "Guessing among equally frequent classes is right this often.",
                "An accuracy over classes of which some are rare, balanced by class, above chance.",
                0.85,
            )


def _constant_predictor(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    yield from _explains_nothing(header)
    yield from _guesses_classes(header)
    yield from _constant_codes(header)


def _explains_nothing(header: CheckpointHeader) -> Iterator[Finding]:
    for series in training_record(header).series:
        if series.held_out and _EXPLAINED.search(series.name) and max(series.values) <= 0.005:
            yield _finding(
                "task.constant_predictor",
                f"{series.name[:100]} is {max(series.values):.4g} at best: no better than the mean",
                series,
                {"best": max(series.values), "last": series.values[-1], "constant": 0.0, "epochs": len(series.values)},
                "Explained variance of 0 is what the mean of the targets scores for every sample.",
                "A positive explained variance on held-out data.",
                0.9,
            )


def _guesses_classes(header: CheckpointHeader) -> Iterator[Finding]:
    classes = run_config(header).number("classes")
    loss = held_out_loss(training_record(header), None)
    if not classes or classes < 2 or loss is None:
        return
    constant = math.log(classes)
    best = min(loss.values)
    # Other losses may pass by the same number; one that stays within 2 % of it all along is that one.
    if all(abs(v - constant) <= 0.02 * constant for v in loss.values):
        yield _finding(
            "task.constant_predictor",
            f"{loss.name[:100]} is {best:.4g} at best; equal odds for {classes:g} classes score {constant:.4g}",
            loss,
            {"best": best, "last": loss.values[-1], "constant": constant, "ratio": best / constant},
            "A cross-entropy of the logarithm of the number of classes is what equal odds for every class score.",
            "A loss that is no cross-entropy.",
            0.8,
        )


def _constant_codes(header: CheckpointHeader) -> Iterator[Finding]:
    """Errors of code numbers, which a constant predicts with their spread: std for errors divided by the std."""
    stated = run_config(header).number("codebook_size")
    if stated is not None and not 2 <= stated < _PLAUSIBLE:
        stated = None
    entries = stated or _USUAL_CODEBOOK
    spread = math.sqrt((entries**2 - 1) / 12)
    for series, dominance, is_part in _code_losses(header):
        last = series.values[-1]
        scores = {"squared error": spread**2, "squared error over the std": spread}
        if _ABSOLUTE.search(series.name):
            scores = {"absolute error": entries / 4, "absolute error over the std": entries / 4 / spread}
        name = min(scores, key=lambda n: abs(last / scores[n] - 1))
        ratio = last / scores[name]
        if not _LIKE_CONSTANT[0] <= ratio <= _LIKE_CONSTANT[1]:
            continue
        yield _finding(
            "task.constant_predictor",
            f"{series.name[:100]} is {last:.6g} at the end, about what a constant scores ({scores[name]:.4g})",
            series,
            {
                "last": last,
                "best": min(series.values),
                "constant": scores[name],
                "ratio": ratio,
                "measure": name,
                "codebook_size": entries,
                "codebook_size_in_the_file": stated is not None,
                **dominance,
            },
            f"Codes from 0 to {entries - 1:.0f} that are equally frequent have a standard deviation of {spread:.1f}. "
            "The same number for every sample, their mean, scores that: the variance as a squared error, and the "
            "standard deviation where the error is divided by the standard deviation and not by the variance. Such a "
            "part also drowns every other in the sum.",
            "The score of the training set's mean on the same held-out data, clearly above this loss.",
            0.75 if stated else 0.5,
            _code_severity(stated is not None, is_part),
        )
        return


def _code_severity(stated: bool, is_part: bool) -> Severity:
    """A total that happens to be near the number is weaker evidence than a part that is called after the codes."""
    if stated:
        return Severity.ERROR if is_part else Severity.WARNING
    return Severity.WARNING if is_part else Severity.INFO


def _code_losses(header: CheckpointHeader) -> Iterator[tuple[Series, dict[str, Any], bool]]:
    """Held-out losses of codes, the total behind them where the model has an audio part."""
    parts_of = dict(loss_parts(header))
    for series in training_record(header).series:
        history, _, leaf = series.name.rpartition(".")
        if series.held_out and _CODES.search(leaf) and _ERROR.search(leaf):
            found = dominant_part(header, history, parts_of[history]) if history in parts_of else None
            yield series, ({"share_of_the_loss": found[1]} if found and found[0] == leaf else {}), True
    total = held_out_loss(training_record(header), None)
    if total is not None and any("audio" in t.name.lower() for t in header.model_tensors()):
        yield total, {}, False


def _finding(
    finding_id: str,
    title: str,
    series: Series,
    evidence: dict[str, Any],
    explanation: str,
    refuted_by: str,
    confidence: float,
    severity: Severity = Severity.ERROR,
) -> Finding:
    return Finding(
        id=finding_id,
        severity=severity,
        title=title,
        dimension=Dimension.TASK_EVIDENCE,
        where=(series.name[:200],),
        evidence=evidence,
        explanation=explanation,
        confidence=confidence,
        refuted_by=refuted_by,
        action="Run the reconstruct job, which measures the task with chance levels and baselines.",
    )


def _has_task_series(facts: HealthFacts) -> bool:
    classes = run_config(facts.header).number("classes")
    accuracy = [s for s in training_record(facts.header).series if s.held_out and _ACCURACY.search(s.name)]
    return bool(_correlations(facts)) or bool(classes and accuracy)


CHECKS = (
    Check(
        Dimension.TASK_EVIDENCE,
        "correlations and accuracies in the histories",
        _chance_level,
        _has_task_series,
        can_pass=False,
    ),
    Check(
        Dimension.TASK_EVIDENCE,
        "held-out losses against a constant predictor",
        _constant_predictor,
        lambda facts: any(s.held_out for s in training_record(facts.header).series),
        can_pass=False,
    ),
)
