"""Is the file what its labels say? Epochs against batches, the best against the last, the schedule against the rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.health.checks.check import Check
from remote_payload.health.checks.schedule import schedule_evidence
from remote_payload.health.facts import HealthFacts
from remote_payload.health.run_config import as_number
from remote_payload.health.training_record import TrainingRecord, close, held_out_loss, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_WORSE_BY = 0.01
_BEST_KEYS = ("best_val_loss", "best_loss", "best_valid_loss", "best_validation_loss")
_CURRENT_KEYS = ("val_loss", "valid_loss", "validation_loss")


def _epoch_disagrees(facts: HealthFacts) -> Iterator[Finding]:
    record = training_record(facts.header)
    epoch, epochs, batches = record.epoch, record.history_epochs, record.batches
    if epoch is None or not epochs or not batches or epochs in (epoch, epoch + 1):
        return
    per_epoch = record.batches_per_epoch
    # A history that was begun anew by a resumed run is shorter than the label, but then the label divides the batches.
    resumed = epochs < epoch and any(batches % e == 0 for e in (epoch, epoch + 1))
    if per_epoch is None or resumed:
        return
    evidence: dict[str, Any] = {
        "epoch_label": epoch,
        "history_epochs": epochs,
        "batches": batches,
        "batches_per_epoch": per_epoch,
        "batches_if_the_label_were_right": epoch * per_epoch,
        **schedule_evidence(facts.header, record),
    }
    yield Finding(
        id="training.epoch_disagrees",
        severity=Severity.ERROR,
        title=f"Labelled epoch {epoch}, but {batches} batches are {epochs} epochs of {per_epoch}",
        dimension=Dimension.PROVENANCE,
        where=("epoch",),
        evidence=evidence,
        explanation=f"The layers and the optimizer counted {batches} batches, and the histories have {epochs} entries: "
        f"{batches} = {epochs} x {per_epoch}. The label says {epoch}." + _rate_sentence(evidence),
        confidence=0.95,
        refuted_by="A run whose number of batches an epoch changed on the way.",
        action="Do not cite the label. Fix the code that writes it, and name the checkpoint by its step.",
    )


def _rate_sentence(evidence: dict[str, Any]) -> str:
    """What the learning rate says: a third witness beside counters and histories."""
    stored, by_batches = evidence.get("learning_rate"), evidence.get("learning_rate_by_batches")
    if stored is None or by_batches is None:
        return " The learning rate could not be replayed: not measured."
    by_label = evidence["learning_rate_by_label"]
    sentence = (
        f" The config's schedule gives {by_batches:.4g} after these batches and {by_label:.4g} at the label's epoch; "
        f"the optimizer holds {stored:.4g}."
    )
    if "warmup_steps" in evidence:
        sentence += f" (Warm-up of {evidence['warmup_steps']} steps, then {evidence['steps_after_warmup']}"
        closed = evidence.get("learning_rate_by_closed_form")
        sentence += f"; {closed:.4g} in closed form, a few steps off.)" if closed is not None else ".)"
    return sentence


def _label(header: CheckpointHeader, names: tuple[str, ...]) -> Optional[float]:
    for name in names:
        number = as_number(header.scalars.get(name))
        if number is not None:
            return number
    return None


def _best_is_last(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    record = training_record(header)
    best, current = _label(header, _BEST_KEYS), _label(header, _CURRENT_KEYS)
    series = held_out_loss(record, best)
    if series is None or len(series.values) < 2:
        return
    least, last = min(series.values), series.values[-1]
    at = series.values.index(least) + 1
    if last <= least * (1 + _WORSE_BY) or last <= least:
        return
    called_best = "best" in os.path.basename(header.path).lower() or (current is not None and close(current, least))
    if not called_best:
        return
    epochs = len(series.values)
    holds_last = _holds_last(record, at, epochs)
    if holds_last is False:
        return
    yield Finding(
        id="training.best_is_last",
        severity=Severity.ERROR if holds_last else Severity.WARNING,
        title=f"Called the best, but it holds the weights of epoch {epochs}; the best was epoch {at}",
        dimension=Dimension.PROVENANCE,
        where=(series.name,),
        evidence={
            "best": least,
            "best_epoch": at,
            "last": last,
            "last_epoch": epochs,
            "worse_by": (last - least) / abs(least) if least else None,
            "best_label": best,
            "batches_of_the_weights": record.counted or record.optimizer_steps,
        },
        explanation="The history in the file goes on past its best epoch, and the counters say that the weights are "
        "those of its end: the last weights stand under the best's label.",
        confidence=0.95 if holds_last else 0.6,
        refuted_by="Counters equal to those at the best epoch: weights that were put back before the file was written.",
        action="Look for the checkpoint that was written at the best epoch; fix the condition that saves the best.",
    )


def _holds_last(record: TrainingRecord, best_epoch: int, epochs: int) -> Optional[bool]:
    """Whether the weights are those of the last epoch; False if they are those of the best, None if nothing tells."""
    held = record.counted or record.optimizer_steps
    if not held:
        return None
    if record.steps and record.steps % epochs == 0:
        per_epoch = record.steps // epochs
        if held in (best_epoch * per_epoch, epochs * per_epoch):
            return held == epochs * per_epoch
    if held % epochs == 0:
        return True
    return False if held % best_epoch == 0 else None


def _history_contradiction(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    best = _label(header, _BEST_KEYS)
    series = held_out_loss(training_record(header), best)
    if best is None or series is None or close(min(series.values), best) or best < min(series.values):
        # A best from before a resumed history is below everything in it.
        return
    yield Finding(
        id="training.history_contradiction",
        severity=Severity.WARNING,
        title=f"The best loss is labelled {best:.6g}, but the history has {min(series.values):.6g}",
        dimension=Dimension.PROVENANCE,
        where=(series.name,),
        evidence={"label": best, "history_best": min(series.values), "epochs": len(series.values)},
        explanation="A best that is worse than an entry of its own history was not updated, or means another quantity.",
        confidence=0.6,
        refuted_by="A label for another metric than the history's.",
        action="Check which quantity selects the best checkpoint.",
    )


def _knows_epochs(facts: HealthFacts) -> bool:
    record = training_record(facts.header)
    return record.epoch is not None and bool(record.history_epochs) and bool(record.batches)


def _knows_held_out_loss(facts: HealthFacts) -> bool:
    return held_out_loss(training_record(facts.header), None) is not None


CHECKS = (
    Check(Dimension.PROVENANCE, "the epoch label against counters and histories", _epoch_disagrees, _knows_epochs),
    Check(
        Dimension.PROVENANCE,
        "the best epoch against the history",
        _best_is_last,
        _knows_held_out_loss,
        can_pass=False,
    ),
    Check(
        Dimension.PROVENANCE,
        "the best loss against the history",
        _history_contradiction,
        _knows_held_out_loss,
        can_pass=False,
    ),
)
