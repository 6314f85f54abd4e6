"""Why a parameter did not move: what the optimizer's state says. Pure.

Rounding can hold a value at 1, where one step of the type is large against a training step; it cannot hold one at 0,
where the type's steps are finer than anything an optimizer computes.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
from remote_payload.health.facts import HealthFacts
from remote_payload.health.stats import JointStats

HALF_STEP_BELOW_ONE = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-25}
"""Half the distance from 1.0 to the next smaller number: a smaller step down is rounded away. Up it is twice that."""
_MOSTLY = 0.5


class Cause(str, enum.Enum):
    """Causes of a parameter at its initial value, as far as the optimizer's state tells them apart."""

    NO_OPTIMIZER = "no_optimizer_in_the_file"
    UNMATCHED = "optimizer_entries_not_matched_to_parameters"
    NOT_IN_OPTIMIZER = "not_in_the_optimizer"
    NO_STATE = "in_the_optimizer_but_never_stepped"
    ZERO_GRADIENT = "gradient_exactly_zero"
    EPS_FLOORED = "second_moment_below_eps"
    ROUNDED_AWAY = "steps_rounded_away"
    CONTRADICTED = "has_gradients_and_steps_that_would_show"
    UNDETERMINED = "undetermined"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A cause with its numbers. `sentence` completes "It …"."""

    cause: Cause
    sentence: str
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)


def parameters_by_moment(header: CheckpointHeader) -> dict[str, str]:
    """The name of every tensor in the optimizer's state → its parameter's, as far as entries can be matched."""
    names = {f"{o.path}/state/{index}": name for o in header.optimizers for index, name in o.parameters.items()}
    found = {}
    for tensor in header.tensors:
        if tensor.section is Section.OPTIMIZER:
            place = tensor.name.rpartition("/")[0]
            if place in names:
                found[tensor.name] = names[place]
    return found


def diagnose(facts: HealthFacts, tensor: TensorEntry) -> Diagnosis:
    """The cause that the file gives evidence of for a parameter that is still at its initial 0 or 1."""
    optimizers = facts.header.optimizers
    if not optimizers:
        return Diagnosis(Cause.NO_OPTIMIZER, "cannot be explained further: the file holds no optimizer")
    if tensor.name not in facts.matched_parameters:
        if facts.optimizer_names is None:
            words = "cannot be explained further: the optimizer's entries are not all matched to parameters"
            return Diagnosis(Cause.UNMATCHED, words)
        return Diagnosis(Cause.NOT_IN_OPTIMIZER, "is no part of the optimizer")
    if any(tensor.name in o.without_state for o in optimizers):
        return Diagnosis(Cause.NO_STATE, "is in the optimizer but never got a gradient: there is no state for it")
    joint = facts.joint(tensor.name)
    if joint is None:
        return Diagnosis(Cause.UNDETERMINED, "has moments that could not be read together with it")
    return _from_moments(facts, tensor, joint)


def _from_moments(facts: HealthFacts, tensor: TensorEntry, joint: JointStats) -> Diagnosis:
    stats = facts.scan.stats.get(tensor.name)
    at_zero = stats is not None and (stats.zero_fraction or 0.0) >= _MOSTLY
    evidence = joint_evidence(joint)
    second = facts.header.tensor(joint.second_moment)
    if joint.v_all_zero:
        if second.dtype == "float16":
            return Diagnosis(
                Cause.UNDETERMINED, "has a second moment of exactly 0, which float16 also underflows to", evidence
            )
        return Diagnosis(Cause.ZERO_GRADIENT, "got a gradient of exactly 0: its v is 0 throughout", evidence)
    if joint.v_zero_fraction >= _MOSTLY and second.dtype != "float16":
        share = f"{joint.v_zero_fraction:.1%}"
        return Diagnosis(
            Cause.ZERO_GRADIENT, f"got a gradient of exactly 0 in {share} of its elements: their v is 0", evidence
        )
    if not at_zero and (joint.ones_rounded_fraction_at_peak or 0.0) >= _MOSTLY:
        half = HALF_STEP_BELOW_ONE.get(tensor.dtype, 0.0)
        return Diagnosis(
            Cause.ROUNDED_AWAY,
            f"gets steps that {tensor.dtype} rounds away: leaving 1.0 takes a step over {half:.3g} down or "
            f"{2 * half:.3g} up",
            evidence,
        )
    if (joint.v_below_eps_fraction or 0.0) >= _MOSTLY:
        return Diagnosis(
            Cause.EPS_FLOORED, "has gradients so small that eps and not they sets the step's size", evidence
        )
    if joint.settings.learning_rate == 0 and joint.settings.peak_learning_rate == 0:
        return Diagnosis(Cause.UNDETERMINED, "has a learning rate of 0", evidence)
    return Diagnosis(
        Cause.CONTRADICTED,
        "has gradients and steps that would have moved it"
        + (", and rounding cannot hold a value at 0: it was set anew or the state is another's" if at_zero else ""),
        evidence,
    )


def is_frozen_by_design(facts: HealthFacts, tensor: TensorEntry, diagnosis: Diagnosis) -> bool:
    """Whether a parameter at its initial value is no sign of anything gone wrong in this training.

    So where none of its kind is in the optimizer (adapters over a frozen base), and where a file without an optimizer
    was cast to 16 bits, which takes values near 1 back to 1.
    """
    if diagnosis.cause is Cause.NO_OPTIMIZER:
        return tensor.dtype in ("bfloat16", "float16")
    kind = [t.name for t in facts.header.model_tensors() if t.role is tensor.role]
    if diagnosis.cause is Cause.NOT_IN_OPTIMIZER:
        return not set(kind) & (facts.optimizer_names or set())
    if diagnosis.cause is Cause.UNMATCHED:
        return sum(o.parameter_count for o in facts.header.optimizers) < len(kind) or _no_moment_like(
            facts.header, tensor
        )
    return False


def _no_moment_like(header: CheckpointHeader, tensor: TensorEntry) -> bool:
    """No entry of the optimizer has the parameter's shape, so it cannot be among them."""
    return all(t.shape != tensor.shape for t in moments(header, Role.FIRST_MOMENT))


def joint_evidence(joint: JointStats) -> dict[str, Any]:
    """The numbers that a cause rests on."""
    return {
        "v_zero_fraction": joint.v_zero_fraction,
        "v_below_eps_fraction": joint.v_below_eps_fraction,
        "steps_rounded_at_one": joint.ones_rounded_fraction,
        "steps_rounded_at_one_at_peak": joint.ones_rounded_fraction_at_peak,
        "zeros_with_gradient": joint.zeros_with_gradient,
        "learning_rate": joint.settings.learning_rate,
        "peak_learning_rate": joint.settings.peak_learning_rate,
    }


def summarise(diagnoses: list[Diagnosis]) -> str:
    """One sentence a distinct cause, with how many it holds for."""
    counted: dict[Cause, list[Diagnosis]] = {}
    for diagnosis in diagnoses:
        counted.setdefault(diagnosis.cause, []).append(diagnosis)
    many = len(diagnoses) > 1
    parts = []
    for group in counted.values():
        if not many:
            parts.append(f"It {group[0].sentence}.")
        else:
            parts.append(f"{len(group)} of {len(diagnoses)}: each {group[0].sentence}.")
    return " ".join(parts)


def moments(header: CheckpointHeader, role: Role) -> list[TensorEntry]:
    """The optimizer's moments of one kind that are more than one number."""
    return [t for t in header.tensors if t.role is role and t.section is Section.OPTIMIZER and t.numel > 1]
