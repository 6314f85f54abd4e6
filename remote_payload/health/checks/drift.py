"""What did not move since an earlier checkpoint of the same run."""

from __future__ import annotations

from collections.abc import Iterator

from remote_payload.checkpoint.header import PARAMETER_ROLES, Role
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts, TensorDrift
from remote_payload.health.frozen import diagnose, summarise
from remote_payload.wire.results import Dimension, Finding, Severity

_UNCHANGED = 0.999
_ALL = 0.95


def _unchanged(facts: HealthFacts) -> Iterator[Finding]:
    drift = facts.drift
    if drift is None:
        return
    roles = {t.name: t for t in facts.header.model_tensors()}
    parameters = {n: d for n, d in drift.tensors.items() if roles[n].role in PARAMETER_ROLES - {Role.OTHER}}
    still = {n: d for n, d in parameters.items() if d.identical_fraction >= _UNCHANGED}
    if not still:
        return
    elements = sum(d.count for d in parameters.values())
    share = sum(d.count for d in still.values()) / elements if elements else 0.0
    went_on = drift.steps is not None and drift.earlier_steps is not None and drift.steps > drift.earlier_steps
    weights = [n for n in still if roles[n].role not in (Role.BIAS, Role.NORM_SHIFT)]
    diagnoses = [diagnose(facts, roles[n]) for n in still]
    everything = share >= _ALL
    if everything:
        severity = Severity.ERROR if went_on else Severity.WARNING
    else:
        severity = Severity.WARNING if weights and went_on else Severity.INFO
    yield Finding(
        id="drift.unchanged",
        severity=severity,
        title=f"{len(still)} of {len(parameters)} parameters are bit for bit those of the earlier checkpoint",
        dimension=Dimension.TRAINING_DYNAMICS,
        where=tuple(n[:200] for n in list(still)[:50]),
        evidence={
            "earlier": drift.earlier[-200:],
            "share_of_elements": share,
            "steps": drift.steps,
            "earlier_steps": drift.earlier_steps,
            "unchanged": [{"parameter": n[:200], **_numbers(d)} for n, d in list(still.items())[:20]],
            "most_changed": [
                {"parameter": n[:200], **_numbers(d)}
                for n, d in sorted(parameters.items(), key=lambda p: -(p[1].relative_change or 0.0))[:5]
            ],
            "not_compared": len(drift.not_compared),
        },
        explanation="Between the two files "
        + (f"the counters went from {drift.earlier_steps} to {drift.steps}" if went_on else "no step was counted")
        + ", and these parameters did not change in a single bit: they are frozen, get no gradient, or their steps "
        "are rounded away. " + ("" if everything and not went_on else summarise(diagnoses)),
        confidence=0.95,
        refuted_by="Parameters that are frozen on purpose, or two copies of one save.",
        action="Compare with the list of parameters that are meant to be trained.",
    )


def _numbers(drift: TensorDrift) -> dict[str, object]:
    return {
        "identical_fraction": drift.identical_fraction,
        "relative_change": drift.relative_change,
        "cosine": drift.cosine,
    }


CHECKS = (
    Check(
        Dimension.TRAINING_DYNAMICS,
        "what moved since the earlier checkpoint",
        _unchanged,
        lambda facts: facts.drift is not None and bool(facts.drift.tensors),
        can_pass=False,
    ),
)
