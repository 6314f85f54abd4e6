"""The optimizer's state against the model: what is missing, what stands still, what belongs to something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.header import CheckpointHeader, OptimizerFacts, Role, Section, TensorEntry
from remote_payload.checkpoint.parameter_match import NOT_DERIVABLE
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.frozen import joint_evidence, moments, parameters_by_moment
from remote_payload.health.run_config import as_number
from remote_payload.wire.results import Dimension, Finding, Severity

_TRAINABLE = frozenset({Role.WEIGHT_MATRIX, Role.EMBEDDING, Role.BIAS, Role.NORM_SCALE, Role.NORM_SHIFT})
_SHIFTS = frozenset({Role.BIAS, Role.NORM_SHIFT})
_LARGE_SHARE = 0.05
_MOST_PARTS = 100
_FLOORED = 0.5
_USUAL_EPS = 1e-6


def _missing_state(facts: HealthFacts) -> Iterator[Finding]:
    if facts.steps_trained() == 0:
        return
    trainable = {t.name: t for t in facts.header.model_tensors() if t.role in _TRAINABLE and is_floating(t.dtype)}
    for optimizer in facts.header.optimizers:
        yield from _without_state(facts, optimizer, trainable)
    left_out = _not_in_optimizer(facts, trainable)
    if left_out:
        yield _missing(
            Severity.INFO,
            f"{len(left_out)} of {len(trainable)} parameters are no part of the optimizer",
            tuple(left_out),
            {"parameters": len(left_out), "of": len(trainable)},
            "They keep whatever values they had when the optimizer was made: frozen on purpose, or forgotten.",
        )


def _without_state(
    facts: HealthFacts, optimizer: OptimizerFacts, trainable: dict[str, TensorEntry]
) -> Iterator[Finding]:
    if optimizer.state_count == 0:
        if any("betas" in g for g in optimizer.groups) and optimizer.parameter_count:
            yield _missing(
                Severity.WARNING,
                f"The optimizer holds {optimizer.parameter_count} parameters and no state for any",
                (optimizer.path,),
                {"parameters": optimizer.parameter_count, "with_state": 0, "steps_trained": facts.steps_trained()},
                "The file is of a trained model, but its optimizer has not taken a step: resuming from it starts the "
                "moments anew.",
            )
        return
    if optimizer.without_state:
        total = sum(t.numel for t in trainable.values()) or 1
        share = sum(trainable[n].numel for n in optimizer.without_state if n in trainable) / total
        yield _missing(
            Severity.WARNING if share >= _LARGE_SHARE else Severity.INFO,
            f"{len(optimizer.without_state)} parameters are in the optimizer but never got a gradient",
            optimizer.without_state,
            {"parameters": len(optimizer.without_state), "of": optimizer.parameter_count, "share_of_elements": share},
            "An optimizer makes a parameter's state when it first gets a gradient. These got none: the forward pass "
            "does not use them, or their part of it is cut off from the loss.",
        )


def _not_in_optimizer(facts: HealthFacts, trainable: dict[str, TensorEntry]) -> list[str]:
    held = facts.optimizer_names
    # Of an optimizer without state the matches are by count alone.
    if held is None or not any(o.state_count for o in facts.header.optimizers):
        return []
    shared = {(t.storage_key, t.storage_offset) for n, t in trainable.items() if n in held and t.storage_key}
    return [n for n, t in trainable.items() if n not in held and (t.storage_key, t.storage_offset) not in shared]


def _missing(
    severity: Severity, title: str, where: tuple[str, ...], evidence: dict[str, Any], explanation: str
) -> Finding:
    return Finding(
        id="optimizer.missing_state",
        severity=severity,
        title=title,
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(n[:200] for n in where[:50]),
        evidence=evidence,
        explanation=explanation,
        confidence=0.9,
        refuted_by="Parameters that are frozen on purpose, or a state that another file keeps.",
        action="Compare the optimizer's parameter groups with the model's trainable parameters.",
    )


def _second_moments(facts: HealthFacts) -> list[tuple[str, TensorEntry]]:
    """(parameter's or moment's name, second moment) for every one that was measured."""
    names = parameters_by_moment(facts.header)
    kept = [t for t in moments(facts.header, Role.SECOND_MOMENT) if t.name in facts.scan.stats]
    return [(names.get(t.name, t.name), t) for t in kept]


def _role_of(facts: HealthFacts, parameter: str) -> Optional[Role]:
    try:
        tensor = facts.header.tensor(parameter)
    except KeyError:
        return None
    return tensor.role if tensor.section is Section.MODEL else None


def _zero_gradient(facts: HealthFacts) -> Iterator[Finding]:
    if not any(s > 0 for s in _steps(facts.header)):
        return
    found = _second_moments(facts)
    # Squared gradients below 6e-8 underflow in float16, so its zeros say nothing.
    dead = [
        (n, t)
        for n, t in found
        if t.dtype != "float16" and facts.scan.stats[t.name].zero_fraction == 1.0 and t.name.endswith("exp_avg_sq")
    ]
    if not dead:
        return
    roles = {n: _role_of(facts, n) for n, _ in dead}
    important = [n for n, role in roles.items() if role is not None and role not in _SHIFTS]
    severity = Severity.INFO
    if important:
        severity = Severity.ERROR if len(dead) == len(found) else Severity.WARNING
    yield Finding(
        id="optimizer.zero_gradient",
        severity=severity,
        title=f"{len(dead)} of {len(found)} parameters got a gradient of exactly 0 at every step",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(n[:200] for n, _ in dead[:50]),
        evidence={
            "parameters": [
                {"parameter": n[:200], "role": role.value if (role := roles[n]) else None, "dtype": t.dtype}
                for n, t in dead[:20]
            ],
            "other_than_biases": len(important),
            "steps": _steps(facts.header)[:5],
        },
        explanation="Adam's second moment sums squared gradients, and here it is 0 throughout. A bias in front of a "
        "normalisation has no gradient, because the normalisation takes any constant away, and so has a "
        "normalisation's shift that the next Linear and normalisation absorb; anything else that got none is cut off "
        "from the loss.",
        confidence=0.95,
        refuted_by="A non-zero gradient of these parameters on any batch in training mode.",
        action="Leave redundant biases out of the model; for others find where the path to the loss is cut.",
    )


def _steps(header: CheckpointHeader) -> list[float]:
    return [n for o in header.optimizers for n in map(as_number, o.steps) if n is not None]


def _eps_floored(facts: HealthFacts) -> Iterator[Finding]:
    floored = [j for j in facts.scan.joint.values() if (j.v_below_eps_fraction or 0.0) >= _FLOORED]
    if not floored:
        return
    roles = {j.parameter: _role_of(facts, j.parameter) for j in floored}
    important = [j for j in floored if roles[j.parameter] not in _SHIFTS and j.settings.eps <= _USUAL_EPS]
    yield Finding(
        id="optimizer.eps_floored",
        severity=Severity.WARNING if important else Severity.INFO,
        title=f"{len(floored)} parameters have gradients below Adam's eps",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(j.parameter[:200] for j in floored[:50]),
        evidence={
            "eps": floored[0].settings.eps,
            "other_than_biases": len(important),
            "parameters": [
                {
                    "parameter": j.parameter[:200],
                    "median_root_v_over_eps": j.eps_ratio_quantiles[4] if j.eps_ratio_quantiles else None,
                    **joint_evidence(j),
                }
                for j in floored[:20]
            ],
        },
        explanation="Where the root of the second moment is below eps, Adam's step is no longer about the learning "
        "rate but smaller by their ratio: these parameters hardly move although they have gradients.",
        confidence=0.85,
        refuted_by="Gradients that vanish because the parameter is redundant, as a bias in front of a normalisation.",
        action="Look at the size of the loss and of these gradients; scale the loss or lower eps.",
    )


def _misaligned(facts: HealthFacts) -> Iterator[Finding]:
    wrong = facts.scan.misaligned
    if wrong:
        yield _misaligned_finding(
            f"{len(wrong)} moments have another shape than their parameters",
            tuple(m.parameter for m in wrong),
            {
                "moments": [
                    {
                        "parameter": m.parameter[:200],
                        "moment": m.moment[:200],
                        "parameter_shape": list(m.parameter_shape),
                        "moment_shape": list(m.moment_shape),
                    }
                    for m in wrong[:20]
                ]
            },
            0.95,
        )
        return
    mismatch = _first_mismatch(facts.header)
    if mismatch is not None:
        position, parameter, moment, strangers = mismatch
        yield _misaligned_finding(
            f"The optimizer's state fits the model up to parameter {position} of its order, and no further",
            (parameter.name,),
            {
                "position": position,
                "parameter": parameter.name[:200],
                "parameter_shape": list(parameter.shape),
                "moment_shape": list(moment),
                "shapes_that_no_parameter_has": strangers,
            },
            0.9 if strangers else 0.6,
        )


def _first_mismatch(
    header: CheckpointHeader,
) -> Optional[tuple[int, TensorEntry, tuple[int, ...], int]]:
    """Where the moments' shapes leave the order of the parameters, if that has no innocent explanation.

    Only one parameter group is judged, whose order is the model's: groups are ordered as their maker likes.
    """
    optimizer = header.optimizer
    if optimizer is None or optimizer.mapping != NOT_DERIVABLE or len(optimizer.groups) > 1 or header.other_optimizers:
        return None
    shapes = _moment_shapes(header)
    parameters = [t for t in header.model_tensors() if t.role in _TRAINABLE or t.role is Role.OTHER]
    parameters = [t for t in parameters if is_floating(t.dtype)]
    if len(shapes) != optimizer.parameter_count or len(shapes) != len(parameters):
        return None
    own = Counter(t.shape for t in parameters)
    strangers = sum((Counter(shapes) - own).values())
    if strangers > len(shapes) // 2 or (not strangers and _is_rearranged(parameters, shapes)):
        # Flattened and sharded states fit nothing at all; parts of a model may be listed in another order.
        return None
    for position, (tensor, shape) in enumerate(zip(parameters, shapes)):
        if tensor.shape != shape:
            return position, tensor, shape, strangers
    return None


def _moment_shapes(header: CheckpointHeader) -> list[tuple[int, ...]]:
    first = [t for t in header.tensors if t.role is Role.FIRST_MOMENT and t.section is Section.OPTIMIZER]
    numbered = []
    for tensor in first:
        index = tensor.name.split("/")[-2]
        if not index.isdecimal():
            return []
        numbered.append((int(index), tensor.shape))
    return [shape for _, shape in sorted(numbered)]


def _is_rearranged(parameters: list[TensorEntry], shapes: list[tuple[int, ...]]) -> bool:
    """Whether the shapes are those of the model's top-level parts, whole, in another order."""
    parts: dict[str, list[tuple[int, ...]]] = {}
    for tensor in parameters:
        parts.setdefault(tensor.name.partition(".")[0], []).append(tensor.shape)
    if len(parts) > _MOST_PARTS:
        return True
    at = 0
    while parts:
        fitting = next((n for n, part in parts.items() if shapes[at : at + len(part)] == part), None)
        if fitting is None:
            return False
        at += len(parts.pop(fitting))
    return True


def _misaligned_finding(title: str, where: tuple[str, ...], evidence: dict[str, Any], confidence: float) -> Finding:
    return Finding(
        id="optimizer.misaligned",
        severity=Severity.WARNING,
        title=title,
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(n[:200] for n in where[:50]),
        evidence=evidence,
        explanation="torch gives each parameter a number by its place in the optimizer's groups. Moments of other "
        "shapes were made by another model, or by one whose parameters came in another order; where shapes happen to "
        "agree, wrong moments load without a word.",
        confidence=confidence,
        refuted_by="A list of parameters that was given to the optimizer in that order on purpose.",
        action="Do not resume from this optimizer state; compare the model's code with the one that saved the file.",
    )


def _negative(facts: HealthFacts) -> Iterator[Finding]:
    bad = []
    for name, tensor in _second_moments(facts):
        least = facts.scan.stats[tensor.name].minimum
        if least is not None and least < 0:
            joint = facts.joint(name)
            bad.append({"parameter": name[:200], "minimum": least, "count": joint.v_negative if joint else None})
    if bad:
        yield Finding(
            id="optimizer.negative_second_moment",
            severity=Severity.ERROR,
            title=f"{len(bad)} second moments hold negative values",
            dimension=Dimension.NUMERICS,
            where=tuple(str(b["parameter"]) for b in bad[:50]),
            evidence={"moments": bad[:20]},
            explanation="A sum of squares cannot be negative. Its root is NaN, and so is the weight after the next "
            "step: the values are damaged, were quantised, or belong to something else.",
            confidence=0.99,
            refuted_by="An optimizer that keeps something else under this name.",
            action="Drop the optimizer's state or go back to an earlier checkpoint.",
        )


def _has_state(facts: HealthFacts) -> bool:
    return any(o.state_count > 0 for o in facts.header.optimizers)


def _has_second_moments(facts: HealthFacts) -> bool:
    return bool(_second_moments(facts))


_NO_OPTIMIZER = "the file holds no optimizer state"

CHECKS = (
    Check(
        Dimension.TRAINING_DYNAMICS,
        "the optimizer's state for every parameter",
        _missing_state,
        lambda facts: facts.header.optimizer is not None,
        can_pass=False,
        why_not=lambda _: _NO_OPTIMIZER,
    ),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "gradients of exactly 0",
        _zero_gradient,
        _has_second_moments,
        why_not=lambda _: _NO_OPTIMIZER,
    ),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "second moments against eps",
        _eps_floored,
        lambda facts: bool(facts.scan.joint),
        why_not=lambda _: "no parameter was read together with its moments",
    ),
    Check(
        Dimension.TRAINING_DYNAMICS,
        "the moments' shapes against the parameters'",
        _misaligned,
        _has_state,
        can_pass=False,
        why_not=lambda _: _NO_OPTIMIZER,
    ),
    Check(Dimension.NUMERICS, "the sign of second moments", _negative, _has_second_moments, can_pass=False),
)
