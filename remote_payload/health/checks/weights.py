"""Weights that do not vary, that repeat themselves, or that are as they were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import Role, Section, TensorEntry
from remote_payload.health.checks.check import Check, has_statistics
from remote_payload.health.checks.structure import biases_before_norms
from remote_payload.health.facts import HealthFacts
from remote_payload.health.frozen import diagnose, summarise
from remote_payload.health.stats import InitDistance, RowStats, TensorStats
from remote_payload.health.training_record import training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_MATRICES = (Role.WEIGHT_MATRIX, Role.EMBEDDING)
_MANY_ROWS = 0.05
_MIN_COLUMNS = 8
"""Rows of fewer elements are equal by chance in a 16-bit type."""
_MIN_ELEMENTS = 1024
"""Below, the shape of a distribution tells nothing."""
_SAME_STD = 0.02
_NEAR_STD = 0.1
_SAME_SHAPE = 0.02
_LONG_TRAINING_STEPS = 1000


def _constant_matrices(facts: HealthFacts) -> Iterator[Finding]:
    constant = [
        (t, s)
        for t, s in facts.measured(*_MATRICES, section=Section.MODEL)
        if s.is_constant and "lora_" not in t.name.lower()
    ]
    if constant:
        diagnoses = {t.name: diagnose(facts, t) for t, _ in constant}
        # An output layer or a gate may well start at 0; one that never saw a step is no defect.
        harmless = facts.steps_trained() == 0 and all(s.minimum == 0 for _, s in constant)
        yield Finding(
            id="weights.constant",
            severity=Severity.INFO if harmless else Severity.WARNING,
            title=f"{len(constant)} weight matrices hold one value only",
            dimension=Dimension.NUMERICS,
            where=tuple(t.name[:200] for t, _ in constant[:50]),
            evidence={
                "tensors": [
                    {
                        "tensor": t.name[:200],
                        "value": s.minimum,
                        "of": s.count,
                        "cause": diagnoses[t.name].cause.value,
                        **diagnoses[t.name].evidence,
                    }
                    for t, s in constant[:20]
                ]
            },
            explanation="A matrix of equal values passes on nothing but the sum of its inputs; one of zeros passes on "
            "nothing. Training makes no such matrix: it was never initialised, never trained, or zeroed. "
            + summarise(list(diagnoses.values())),
            confidence=0.9,
            refuted_by="A layer that starts at zero by design and was not trained yet.",
            action="Check that the layer is part of the model that is trained and of its optimizer.",
        )


def _constant_biases(facts: HealthFacts) -> Iterator[Finding]:
    constant = [(t, s) for t, s in facts.measured(Role.BIAS, Role.NORM_SHIFT, section=Section.MODEL) if s.is_constant]
    if not constant or facts.steps_trained() == 0:
        return
    diagnoses = {t.name: diagnose(facts, t) for t, _ in constant}
    redundant = biases_before_norms(facts.header)
    yield Finding(
        id="weights.constant",
        severity=Severity.INFO,
        title=f"{len(constant)} biases hold one value only after training",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t, _ in constant[:50]),
        evidence={
            "tensors": [
                {
                    "tensor": t.name[:200],
                    "value": s.minimum,
                    "of": s.count,
                    "norm_behind": redundant.get(t.name),
                    "cause": diagnoses[t.name].cause.value,
                    **diagnoses[t.name].evidence,
                }
                for t, s in constant[:20]
            ]
        },
        explanation="A bias that is still exactly 0 had a gradient of exactly 0 or is no part of the optimizer: "
        "rounding cannot hold a value at 0, next to which every type has finer numbers than any step. In front of a "
        "normalisation the gradient is 0 because the normalisation takes any constant away; a normalisation's shift "
        "has none either where the next Linear and normalisation absorb it. " + summarise(list(diagnoses.values())),
        confidence=0.8,
        refuted_by="A non-zero second moment for this bias in the optimizer's state.",
        action="None if a normalisation follows; such a bias can be left out of the model.",
    )


def _rows(facts: HealthFacts) -> list[tuple[TensorEntry, TensorStats, RowStats]]:
    return [
        (t, s, s.rows)
        for t, s in facts.measured(*_MATRICES, section=Section.MODEL)
        if s.rows is not None and not s.is_constant and s.rows.rows > 1
    ]


def _dead_rows(facts: HealthFacts) -> Iterator[Finding]:
    dead = [(t, r) for t, _, r in _rows(facts) if r.dead_rows or r.dead_columns or r.constant_rows]
    if not dead:
        return
    # Embeddings keep zeros for padding, and what the vocabulary never used.
    severe = [(t, r) for t, r in dead if t.role is not Role.EMBEDDING and r.dead_rows >= max(1, _MANY_ROWS * r.rows)]
    total = sum(r.dead_rows for _, r in dead)
    yield Finding(
        id="weights.dead_rows",
        severity=Severity.WARNING if severe else Severity.INFO,
        title=f"{total:,} rows of {len(dead)} weights are all zero"
        if total
        else f"{len(dead)} weights have rows or columns of one value",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t, _ in dead[:50]),
        evidence={
            "tensors": [
                {
                    "tensor": t.name[:200],
                    "dead_rows": r.dead_rows,
                    "rows": r.rows,
                    "first": list(r.first_dead_rows),
                    "dead_columns": r.dead_columns,
                    "columns": r.columns,
                    "constant_rows": r.constant_rows,
                }
                for t, r in dead[:20]
            ]
        },
        explanation="A row of zeros is an output that is its bias whatever the input; a column of zeros is an input "
        "that is not looked at. Initialisation draws neither: they were pruned, never loaded, or decayed to nothing.",
        confidence=0.85,
        refuted_by="Pruning, padding or masking on purpose.",
        action="Check how these weights were loaded or pruned.",
    )


def _duplicate_rows(facts: HealthFacts) -> Iterator[Finding]:
    found = [(t, r) for t, _, r in _rows(facts) if r.duplicate_rows and r.columns >= _MIN_COLUMNS]
    if not found:
        return
    # Tokens that were added to a vocabulary all start at the mean of the others.
    severe = [t for t, r in found if t.role is not Role.EMBEDDING and r.duplicate_rows >= max(2, _MANY_ROWS * r.rows)]
    yield Finding(
        id="weights.duplicate_rows",
        severity=Severity.WARNING if severe else Severity.INFO,
        title=f"{sum(r.duplicate_rows for _, r in found):,} rows of {len(found)} weights equal another row bit for bit",
        dimension=Dimension.NUMERICS,
        where=tuple(t.name[:200] for t, _ in found[:50]),
        evidence={
            "tensors": [
                {
                    "tensor": t.name[:200],
                    "duplicate_rows": r.duplicate_rows,
                    "groups": r.duplicate_row_groups,
                    "rows": r.rows,
                    "columns": r.columns,
                    "first_pairs": [list(p) for p in r.first_duplicate_rows],
                }
                for t, r in found[:20]
            ]
        },
        explanation="Two units with equal weights get equal gradients and stay equal for ever: they are one unit that "
        "is counted twice. Random initialisation never draws it; copying, tiling or a constant initialisation does.",
        confidence=0.9,
        refuted_by="Rows that were copied on purpose, as when a vocabulary or a layer is widened.",
        action="Look for the code that copies or tiles these weights.",
    )


def _nearest_init(stats: TensorStats) -> Optional[InitDistance]:
    """The initialisation that the values are closest to in shape and width together."""
    return min(stats.init, key=lambda i: abs(i.std_ratio - 1) + i.shape_distance, default=None)


def _at_init(facts: HealthFacts) -> Iterator[Finding]:
    judged: list[tuple[TensorEntry, TensorStats, InitDistance]] = []
    for tensor, stats in facts.measured(Role.WEIGHT_MATRIX, section=Section.MODEL):
        nearest = _nearest_init(stats)
        if nearest is not None and stats.count >= _MIN_ELEMENTS and not stats.is_constant:
            judged.append((tensor, stats, nearest))
    near = [(t, s, i) for t, s, i in judged if abs(i.std_ratio - 1) <= _NEAR_STD and i.shape_distance <= _SAME_SHAPE]
    if not near:
        return
    same = [t for t, _, i in near if abs(i.std_ratio - 1) <= _SAME_STD]
    steps = training_record(facts.header).batches or facts.steps_trained()
    long_trained = steps >= _LONG_TRAINING_STEPS and len(same) == len(judged) > 1
    yield Finding(
        id="weights.at_init",
        severity=Severity.WARNING if long_trained else Severity.INFO,
        title=f"{len(near)} of {len(judged)} weight matrices are distributed as they were initialised",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(t.name[:200] for t, _, _ in near[:50]),
        evidence={
            "steps_trained": steps,
            "judged": len(judged),
            "within_2_percent": len(same),
            "tensors": [_init_evidence(t, s, i) for t, s, i in near[:30]],
        },
        explanation="Width and shape of the distribution are those of a fresh draw: std between "
        f"{min(i.std_ratio for _, _, i in near):.2f} and {max(i.std_ratio for _, _, i in near):.2f} times the "
        "initial one. That is no evidence of learning: noise alone, added by gradients without signal, widens a "
        "distribution more. It is no proof of the contrary either, since a wide layer can learn by small changes.",
        confidence=0.6 if steps else 0.9,
        refuted_by="Drift against an earlier checkpoint of the same run, with a cosine well below 1.",
        action="Compare with an earlier checkpoint of the run (--against), which shows what moved.",
    )


def _init_evidence(tensor: TensorEntry, stats: TensorStats, nearest: InitDistance) -> dict[str, Any]:
    return {
        "tensor": tensor.name[:200],
        "scheme": nearest.scheme,
        "std": stats.std,
        "std_ratio": nearest.std_ratio,
        "shape_distance": nearest.shape_distance,
    }


def _has_rows(facts: HealthFacts) -> bool:
    return bool(_rows(facts))


def _has_init(facts: HealthFacts) -> bool:
    return any(s.init for _, s in facts.measured(Role.WEIGHT_MATRIX, section=Section.MODEL))


CHECKS = (
    Check(Dimension.NUMERICS, "constant weight matrices", _constant_matrices, has_statistics),
    Check(Dimension.NUMERICS, "constant biases", _constant_biases, has_statistics),
    Check(Dimension.NUMERICS, "rows and columns of zeros", _dead_rows, _has_rows),
    Check(Dimension.NUMERICS, "equal rows", _duplicate_rows, _has_rows),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "the weights' distributions against their initialisation",
        _at_init,
        _has_init,
        can_pass=False,
    ),
)
