"""From evidence to outcome: does the model beat the train mean, and does it beat chance. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Optional

from remote_payload.reconstruct.collapse import Collapse
from remote_payload.reconstruct.measured import NEAREST, RIDGE, Evidence, Metric
from remote_payload.reconstruct.protocol import Kind, Role
from remote_payload.wire.results import Dimension, Finding, Outcome, Severity

SIGNIFICANCE = 0.05
_CONSTANT_SPREAD = 1e-3
_ALIKE = 0.02
"""Outputs are alike if what keeps their mean correlation from 1 is less than this share of the targets'."""
_COPIED = 0.05
_RIVAL_WORDS = {RIDGE: "ridge regression", NEAREST: "the nearest training stimulus"}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The outcome for one modality, its sentence and the findings behind it."""

    modality: str
    role: Role
    outcome: Outcome
    sentence: str
    findings: tuple[Finding, ...] = ()


def judge(evidence: Evidence) -> Judgement:
    """Pass only if the model clearly beats the train mean and chance; fail if it is worse, constant or at chance.

    Above chance without being told from the train mean is a warning. So are outputs that are all alike or copies of
    training samples, and being worse than a linear regression or the nearest training sample, unless those may copy
    the targets from the inputs. Without a baseline, or with too few samples to say, it is not measured.
    """
    name, role = _name(evidence), evidence.modality.role
    collapse = evidence.collapse or Collapse(None, None, None)
    if collapse.spread is not None and collapse.spread < _CONSTANT_SPREAD and evidence.n > 1:
        finding = _finding(
            evidence,
            "task.constant_predictor",
            "gives the same output whatever the input",
            {"output_variance_ratio": collapse.spread, "n": evidence.n},
            "The outputs' variance over samples is next to nothing of the targets': the model has collapsed.",
        )
        return Judgement(evidence.modality.name, role, Outcome.FAIL, f"{name}: constant output", (finding,))
    better, above = _against_baseline(evidence), _above_chance(evidence)
    outcome = _outcome(better, above)
    losing = _losing_to(evidence)
    collapsing = _collapse_findings(evidence, collapse)
    if outcome is Outcome.PASS and (collapsing or (losing and not evidence.copies)):
        outcome = Outcome.WARN
    told = [
        _baseline_words(evidence, better),
        _rival_words(evidence, losing),
        *(words for _, words in collapsing),
        _chance_words(evidence, above),
    ]
    findings = [*_findings(evidence, better, above), *(finding for finding, _ in collapsing)]
    sentence = f"{name}: {'; '.join(filter(None, told))}"
    return Judgement(evidence.modality.name, role, outcome, sentence, tuple(findings))


def overall(judgements: Sequence[Judgement]) -> tuple[Outcome, str]:
    """The task's outcome and headline: pass if every target modality passes, fail if none does better than fail.

    Auxiliary modalities are told in the headline and decide nothing.
    """
    targets = [j for j in judgements if j.role is Role.TARGET]
    outcomes = {j.outcome for j in targets}
    if not outcomes or outcomes == {Outcome.NOT_MEASURED}:
        outcome = Outcome.NOT_MEASURED
    elif outcomes == {Outcome.PASS}:
        outcome = Outcome.PASS
    elif outcomes <= {Outcome.FAIL, Outcome.NOT_MEASURED}:
        outcome = Outcome.FAIL
    else:
        outcome = Outcome.WARN
    told = [j.sentence for j in targets]
    told += [f"{j.sentence} (beside the verdict)" for j in judgements if j.role is Role.AUXILIARY]
    return outcome, ". ".join(told) + "." if told else "Nothing was compared."


def _against_baseline(evidence: Evidence) -> Optional[str]:
    """better, worse, same, or None where it cannot be told."""
    if evidence.gain is None:
        return None
    low, high = evidence.gain
    return "better" if low > 0 else "worse" if high < 0 else "same"


def _losing_to(evidence: Evidence) -> list[str]:
    """The rivals that are better than the model beyond doubt."""
    return [name for name, (_, high) in evidence.rivals.items() if high < 0]


def _above_chance(evidence: Evidence) -> Optional[bool]:
    if evidence.similarity is not None and evidence.similarity.value is None:
        return False
    null = evidence.null
    return None if null is None or null.p is None else null.p < SIGNIFICANCE


def _outcome(better: Optional[str], above: Optional[bool]) -> Outcome:
    if better == "worse" or above is False:
        return Outcome.FAIL
    if better is None or above is None:
        return Outcome.NOT_MEASURED
    return Outcome.PASS if better == "better" else Outcome.WARN


def _findings(evidence: Evidence, better: Optional[str], above: Optional[bool]) -> list[Finding]:
    found = []
    if better == "worse":
        found.append(
            _finding(
                evidence,
                f"task.worse_than_{evidence.baseline}",
                f"is worse than the {_words(evidence.baseline)}",
                _gain_evidence(evidence),
                f"Giving {_baseline_meaning(evidence)} for every sample would do better.",
            )
        )
    for rival in _losing_to(evidence):
        found.append(_rival_finding(evidence, rival))
    if above is False:
        null = evidence.null
        found.append(
            _finding(
                evidence,
                "task.chance_level",
                "is at chance",
                {
                    "metric": evidence.similarity.id if evidence.similarity else None,
                    "value": evidence.similarity.value if evidence.similarity else None,
                    "null_mean": null.mean if null else None,
                    "p": null.p if null else None,
                    "n": evidence.n,
                },
                "Paired with the wrong targets the outputs score as well.",
            )
        )
    return found


def _collapse_findings(evidence: Evidence, collapse: Collapse) -> list[tuple[Finding, str]]:
    """Findings on the outputs as a set, each with its words in the headline."""
    found = []
    if collapse.alike is not None:
        given, wanted = collapse.alike
        if wanted < 1.0 and 1.0 - given < _ALIKE * (1.0 - wanted):
            finding = _finding(
                evidence,
                "task.outputs_alike",
                "gives nearly the same output whatever the input",
                {"output_pairwise_similarity": given, "targets": wanted, "n": evidence.n},
                "Two outputs are far more alike than two targets are.",
            )
            found.append((finding, f"outputs hardly differ (correlation {given:.4f}, of targets {wanted:.4f})"))
    if collapse.copied is not None and collapse.copied > _COPIED:
        finding = _finding(
            evidence,
            "task.copies_training",
            "gives training samples back",
            {"training_copies_share": collapse.copied, "n": evidence.n},
            "Outputs lie on training targets, and far from their own.",
        )
        found.append((finding, f"{collapse.copied:.0%} of the outputs copy a training sample"))
    severity = Severity.WARNING if evidence.modality.role is Role.TARGET else Severity.INFO
    return [(dataclasses.replace(finding, severity=severity), words) for finding, words in found]


def _rival_finding(evidence: Evidence, rival: str) -> Finding:
    error = evidence.error
    numbers: dict[str, object] = {
        "metric": error.id if error else None,
        "value": error.value if error else None,
        rival: error.baselines.get(rival) if error else None,
        "gain_interval": list(evidence.rivals[rival]),
        "n": evidence.n,
        "targets_among_inputs": evidence.copies,
    }
    made = (
        "A linear map from the inputs" if rival == RIDGE else "The target of the training sample with the nearest input"
    )
    why = "The targets are among the inputs, so a copy is within its reach." if evidence.copies else ""
    found = _finding(
        evidence,
        f"task.worse_than_{rival}",
        f"is worse than {_RIVAL_WORDS[rival]}",
        numbers,
        f"{made} does better. {why}",
    )
    decides = evidence.modality.role is Role.TARGET and not evidence.copies
    return dataclasses.replace(found, severity=Severity.WARNING if decides else Severity.INFO)


def _finding(evidence: Evidence, identifier: str, what: str, numbers: dict[str, object], explanation: str) -> Finding:
    decides = evidence.modality.role is Role.TARGET
    return Finding(
        id=identifier,
        severity=Severity.ERROR if decides else Severity.INFO,
        title=f"{_name(evidence)} {what}",
        dimension=Dimension.TASK_EVIDENCE,
        where=(evidence.modality.name,),
        evidence=dict(numbers),
        explanation=explanation,
        confidence=0.95,
        refuted_by="More held-out samples, or another split, on which it does not hold.",
    )


def _gain_evidence(evidence: Evidence) -> dict[str, object]:
    error = evidence.error
    return {
        "metric": error.id if error else None,
        "value": error.value if error else None,
        evidence.baseline: error.baselines.get(evidence.baseline) if error else None,
        "gain_interval": list(evidence.gain) if evidence.gain else None,
        "n": evidence.n,
    }


def _baseline_words(evidence: Evidence, better: Optional[str]) -> str:
    baseline, numbers = _words(evidence.baseline), _numbers(evidence.error, evidence.baseline)
    if better is None:
        is_given = evidence.error is not None and evidence.error.baselines
        return f"too few samples to compare with the {baseline}" if is_given else f"no {baseline} to compare with"
    told = {"better": "beats", "worse": "is worse than", "same": "cannot be told from"}[better]
    return f"{told} the {baseline}{numbers}"


def _rival_words(evidence: Evidence, losing: Sequence[str]) -> str:
    if not losing:
        return ""
    error = evidence.error
    told = []
    for rival in losing:
        reached = error.baselines.get(rival) if error else None
        told.append(_RIVAL_WORDS[rival] + ("" if reached is None else f" ({reached:.4g})"))
    return f"is worse than {' and '.join(told)}"


def _chance_words(evidence: Evidence, above: Optional[bool]) -> str:
    similarity = evidence.similarity
    if above is None:
        return "chance not measured"
    if similarity is None or similarity.value is None:
        return "at chance (no variance)"
    p = f", p = {evidence.null.p:.3f}" if evidence.null and evidence.null.p is not None else ""
    null = f" against {evidence.null.mean:.3f}" if evidence.null else ""
    return f"{'above chance' if above else 'at chance'} ({_words(similarity.id)} {similarity.value:.3f}{null}{p})"


def _numbers(error: Optional[Metric], baseline: str) -> str:
    reached = error.baselines.get(baseline) if error is not None else None
    if error is None or error.value is None or reached is None:
        return ""
    return f" ({_words(error.id)} {error.value:.4g} against {reached:.4g})"


def _baseline_meaning(evidence: Evidence) -> str:
    return "the commonest code" if evidence.modality.kind is Kind.CODES else "the mean of the training targets"


def _words(identifier: str) -> str:
    return identifier.replace("train_commonest_code", "commonest code of training").replace("_", " ")


def _name(evidence: Evidence) -> str:
    """The modality's name, with what must be said with it."""
    is_simulated = "simulated" in evidence.modality.label
    return f"{evidence.modality.name} (simulated)" if is_simulated else evidence.modality.name
