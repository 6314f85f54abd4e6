"""The learning rate against the schedule: replayed from the config, and from the scheduler's own state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.run_config import run_config
from remote_payload.health.schedule_reading import ScheduleReading, read_config_schedule, read_scheduler_state
from remote_payload.health.schedules import Schedule, is_power_of
from remote_payload.health.training_record import TrainingRecord, close, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

SLACK_STEPS = 5
"""torch's schedulers step before or after the batch, and hand over to one another a step early or late."""
_LONGEST = 1e12
_MOST_PROCESSES = 64
"""Some launchers step the scheduler once for every process."""
_MOST_STEPS_AN_EPOCH = 20
"""Beyond, a multiple of the epochs comes about too easily by chance."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """A reading of the config's schedule at a count of steps. `agrees`: the stored rate is within the slack."""

    schedule: Schedule
    step: float
    rate: float
    agrees: bool


def replays(header: CheckpointHeader, record: TrainingRecord) -> tuple[ScheduleReading, tuple[Replay, ...]]:
    """The config's schedule in every reading, at every count of steps that the file has."""
    per_epoch, stored = record.batches_per_epoch, record.learning_rate
    reading = read_config_schedule(header, per_epoch)
    made = []
    for count in record.step_counts:
        length = _epoch_length(count, record)
        for schedule in read_config_schedule(header, length).schedules:
            for step, slack in _steps(schedule, count, length, record):
                if step >= schedule.judged_from:
                    agrees = stored is not None and schedule.is_near(stored, step, slack)
                    made.append(Replay(schedule, step, schedule.rate_at(step), agrees))
    return reading, tuple(made)


def _epoch_length(count: int, record: TrainingRecord) -> Optional[float]:
    """Steps an epoch in this count: where gradients are accumulated, fewer optimizer steps than batches."""
    if record.history_epochs and count % record.history_epochs == 0:
        return count / record.history_epochs
    per_epoch = record.batches_per_epoch
    return per_epoch * count / record.batches if per_epoch and record.batches else None


def _steps(
    schedule: Schedule, batches: int, per_epoch: Optional[float], record: TrainingRecord
) -> Iterator[tuple[float, float]]:
    if schedule.unit == "batch":
        yield float(batches), float(SLACK_STEPS)
    elif per_epoch:
        # Stepped after the epoch, the rate is that of the next; stepped before, that of the one just run.
        yield from ((max(0.0, round(batches / per_epoch) - late), 0.0) for late in (0.0, 1.0))
    elif record.history_epochs:
        yield from ((max(0.0, record.history_epochs - late), 0.0) for late in (0.0, 1.0))


def schedule_evidence(header: CheckpointHeader, record: TrainingRecord) -> dict[str, Any]:
    """What the stored rate says about the epoch label: the rate by the counters, and by the label."""
    per_epoch, stored = record.batches_per_epoch, record.learning_rate
    _, made = replays(header, record)
    in_batches = [r for r in made if r.schedule.unit == "batch" and r.step == record.batches]
    if stored is None or not in_batches or per_epoch is None or not record.batches:
        return {}
    # The reading that the stored rate fits best; the plain closed form beside it.
    best = min(in_batches, key=lambda r: abs(r.rate - stored))
    plain = [r for r in in_batches if "," not in r.schedule.name.partition(", stepped")[0]]
    evidence: dict[str, Any] = {
        "learning_rate": stored,
        "learning_rate_by_batches": best.rate,
        "schedule": best.schedule.name,
        "learning_rate_by_label": best.schedule.rate_at((record.epoch or 0) * per_epoch),
    }
    if plain and plain[-1] is not best:
        closed = min(plain, key=lambda r: abs(r.rate - stored))
        evidence["learning_rate_by_closed_form"] = closed.rate
    warmup = _warmup_batches(header, per_epoch)
    if warmup:
        early = 1 if "early" in best.schedule.name else 0
        evidence["warmup_steps"] = warmup - early
        evidence["steps_after_warmup"] = record.batches - warmup + early
    return evidence


def _warmup_batches(header: CheckpointHeader, per_epoch: int) -> Optional[int]:
    config = run_config(header)
    steps, epochs = config.number("warmup_steps"), config.number("warmup_epochs")
    length = steps or (epochs or 0.0) * per_epoch
    return int(length) if 0 < length < _LONGEST else None


def _config_disagrees(facts: HealthFacts) -> Iterator[Finding]:
    header = facts.header
    record = training_record(header)
    rate = record.learning_rate
    reading, made = replays(header, record)
    if rate is None:
        return
    if reading.plateau is not None:
        yield from _plateau(reading, rate)
        return
    if not made or any(r.agrees for r in made):
        return
    nearest = min(made, key=lambda r: abs(r.rate - rate))
    yield _finding(
        f"The optimizer's learning rate {rate:.4g} is not the config's schedule at batch {record.batches}",
        ("optimizer", "config"),
        {
            "learning_rate": rate,
            "expected": nearest.rate,
            "schedule": nearest.schedule.name,
            "step": nearest.step,
            "step_counts": list(record.step_counts),
            "batches_per_epoch": record.batches_per_epoch,
            "slack_steps": SLACK_STEPS,
            "readings_tried": len(made),
        },
        "Config and counters give another learning rate than the optimizer holds, so this config is not the one that "
        "the file was trained with, or the schedule was stepped otherwise.",
    )


def _plateau(reading: ScheduleReading, rate: float) -> Iterator[Finding]:
    """Of a plateau schedule the file allows one test: the rate is the first one times the factor, so many times."""
    settings = reading.plateau
    if settings is None or settings.peak <= 0:
        return
    if close(rate, settings.floor, 1e-6) or is_power_of(settings.factor, rate / settings.peak):
        return
    yield _finding(
        f"The optimizer's learning rate {rate:.4g} is no reduction of {settings.peak:.4g} by {settings.factor:g}",
        ("optimizer", "config"),
        {"learning_rate": rate, "first": settings.peak, "factor": settings.factor, "floor": settings.floor},
        "Reducing on a plateau multiplies the rate by its factor; no number of reductions leads from the config's "
        "rate to the stored one.",
    )


def _state_disagrees(facts: HealthFacts) -> Iterator[Finding]:
    record = training_record(facts.header)
    last, last_rate, curve = read_scheduler_state(facts.header)
    rate = record.learning_rate
    rates = _group_rates(facts.header)
    warmup = _warmup_batches(facts.header, record.batches_per_epoch or 0)
    if last_rate is not None and rates and not any(close(last_rate, r, 1e-5) for r in rates):
        yield _finding(
            f"The scheduler's last learning rate {last_rate:.4g} is not the optimizer's {rates[0]:.4g}",
            ("scheduler", "optimizer"),
            {"scheduler": last_rate, "optimizer": rates[:10], "last_epoch": last},
            "Scheduler and optimizer are written together and hold the same rate; these two are of different moments.",
        )
    elif curve is not None and last is not None and rate is not None and not curve.is_near(rate, last, SLACK_STEPS):
        yield _finding(
            f"The optimizer's learning rate {rate:.4g} is not the scheduler's own curve at its step {last}",
            ("scheduler", "optimizer"),
            {"learning_rate": rate, "expected": curve.rate_at(last), "last_epoch": last, "slack_steps": SLACK_STEPS},
            "The scheduler's settings and its own count of steps give another rate than the optimizer holds.",
        )
    knows_epochs = record.epoch is not None or record.history_epochs is not None
    if last is not None and last > 0 and record.step_counts and knows_epochs and not _is_a_count(last, record, warmup):
        yield _finding(
            f"The scheduler took {last} steps, which are neither the batches nor the epochs of the file",
            ("scheduler",),
            {
                "last_epoch": last,
                "step_counts": list(record.step_counts),
                "epoch_label": record.epoch,
                "history_epochs": record.history_epochs,
            },
            "A scheduler is stepped every batch or every epoch. Its count fits neither the counters nor the labels.",
        )


def _group_rates(header: CheckpointHeader) -> list[float]:
    groups = header.optimizer.groups if header.optimizer else ()
    rates = [g.get("lr") for g in groups if isinstance(g, dict)]
    return [float(r) for r in rates if isinstance(r, (int, float)) and not isinstance(r, bool)]


def _is_a_count(last: int, record: TrainingRecord, warmup: Optional[int]) -> bool:
    epochs = [e for e in (record.epoch, record.history_epochs) if e is not None]
    if any(abs(last - e) <= 1 for e in epochs):
        return True
    # Stepped several times an epoch, as at every tenth of it.
    if any(e > 1 and last % e == 0 and last // e <= _MOST_STEPS_AN_EPOCH for e in epochs):
        return True
    # Of two schedulers taken in turn the second one counts from the end of the warm-up.
    if warmup and any(abs(last + warmup - count) <= SLACK_STEPS for count in record.step_counts):
        return True
    for count in record.step_counts:
        processes = max(1, round(last / count))
        if processes <= _MOST_PROCESSES and abs(last - count * processes) <= SLACK_STEPS:
            return True
        if last < count and count % last == 0:
            # Accumulated gradients: several batches a step of the scheduler; or stepped every epoch.
            return True
    return False


def _finding(title: str, where: tuple[str, ...], evidence: dict[str, Any], explanation: str) -> Finding:
    return Finding(
        id="training.schedule_disagrees",
        severity=Severity.WARNING,
        title=title,
        dimension=Dimension.PROVENANCE,
        where=where,
        evidence=evidence,
        explanation=explanation,
        confidence=0.7,
        refuted_by="A schedule that the file does not describe in full, or that was changed on the way.",
        action="Compare the config in the file with the run's log.",
    )


def _knows_config_schedule(facts: HealthFacts) -> bool:
    return not _config_gap(facts)


def _config_gap(facts: HealthFacts) -> str:
    """Why the config's schedule cannot be replayed, empty if it can."""
    record = training_record(facts.header)
    reading, made = replays(facts.header, record)
    if record.learning_rate is None:
        return "the file holds no learning rate of the optimizer"
    if reading.missing or reading.plateau is not None:
        return reading.missing
    if not record.step_counts:
        return "the file counts no steps"
    return "" if made else "the file is still in its warm-up, whose first rate it does not give"


def _knows_scheduler(facts: HealthFacts) -> bool:
    last, rate, _ = read_scheduler_state(facts.header)
    return last is not None or rate is not None


CHECKS = (
    Check(
        Dimension.PROVENANCE,
        "the learning rate against the config's schedule",
        _config_disagrees,
        _knows_config_schedule,
        can_pass=False,
        why_not=_config_gap,
    ),
    Check(
        Dimension.PROVENANCE,
        "the scheduler's own count and rate",
        _state_disagrees,
        _knows_scheduler,
        can_pass=False,
        why_not=lambda _: "the file holds no scheduler that says where it stands",
    ),
)
