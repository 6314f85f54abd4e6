"""What a checkpoint says about its own training: labels, counters, histories, learning rates. Pure."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role
from remote_payload.health.run_config import as_number, run_config

_EPOCH_KEYS = ("epoch", "current_epoch", "epochs")
_STEP_KEYS = ("global_step", "step", "steps", "iteration", "iter", "num_updates")
_HELD_OUT = re.compile(r"(^|[_./])(val|valid|validation|test|eval|dev)", re.IGNORECASE)
_LOSS = re.compile(r"loss", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Series:
    """One quantity over the epochs. `held_out` if its name says that it was not measured on the training data."""

    name: str
    values: tuple[float, ...]
    held_out: bool


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """`steps` is by the file's own label, `counted` by its normalisation layers, `optimizer_steps` by its optimizer."""

    epoch: Optional[int]
    steps: Optional[int]
    counted: Optional[int]
    optimizer_steps: Optional[int]
    history_epochs: Optional[int]
    series: tuple[Series, ...]
    learning_rate: Optional[float]
    peak_learning_rate: Optional[float]

    @property
    def batches(self) -> Optional[int]:
        """Batches trained, by what is hardest to mislabel: the counters before the label before the optimizer."""
        for value in (self.counted, self.steps, self.optimizer_steps):
            if value:
                return value
        return None

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Every count of steps in the file: where gradients are accumulated, batches and optimizer steps differ."""
        return tuple(dict.fromkeys(v for v in (self.optimizer_steps, self.steps, self.counted) if v))

    @property
    def batches_per_epoch(self) -> Optional[int]:
        """Known if the histories' epochs, or for want of a full history the label's, divide the batches."""
        if not self.batches:
            return None
        if self.history_epochs and self.batches % self.history_epochs == 0:
            return self.batches // self.history_epochs
        # A resumed run begins its histories anew; labels count from 0 or from 1.
        for epochs in (self.epoch, None if self.epoch is None else self.epoch + 1):
            if epochs and epochs > (self.history_epochs or 0) and self.batches % epochs == 0:
                return self.batches // epochs
        return None


def training_record(header: CheckpointHeader) -> TrainingRecord:
    """Collect what is there; what is not is None."""
    counters = [t.value for t in header.model_tensors() if t.role is Role.COUNTER and isinstance(t.value, int)]
    steps = [int(n) for n in map(as_number, header.optimizer.steps if header.optimizer else ()) if n is not None]
    series = tuple(_all_series(header.histories))
    lengths = Counter(len(s.values) for s in series)
    return TrainingRecord(
        epoch=_integer(header.scalars, _EPOCH_KEYS),
        steps=_integer(header.scalars, _STEP_KEYS),
        counted=usual_count(counters),
        optimizer_steps=max(steps, default=None),
        history_epochs=max(lengths, default=None),
        series=series,
        learning_rate=_learning_rate(header, ("lr",)),
        peak_learning_rate=max(
            filter(None, [_learning_rate(header, ("initial_lr", "lr")), run_config(header).number("lr")]), default=None
        ),
    )


def usual_count(counters: Iterable[int]) -> Optional[int]:
    """What most layers counted; of equally frequent numbers the smaller, since some layers count twice."""
    frequency = Counter(counters)
    if not frequency:
        return None
    most = max(frequency.values())
    return min(v for v, n in frequency.items() if n == most)


def _integer(values: dict[str, Any], names: tuple[str, ...]) -> Optional[int]:
    for name in names:
        number = as_number(values.get(name))
        if number is not None and number >= 0 and number == int(number):
            return int(number)
    return None


def _learning_rate(header: CheckpointHeader, names: tuple[str, ...]) -> Optional[float]:
    groups = header.optimizer.groups if header.optimizer else ()
    found = [as_number(g.get(n)) for g in groups if isinstance(g, dict) for n in names]
    return max((f for f in found if f is not None), default=None)


def _all_series(histories: dict[str, Any]) -> Iterable[Series]:
    for name, value in histories.items():
        if isinstance(value, dict):
            for key, values in value.items():
                # {"loss": {"train": […], "val": […]}} as well as {"train_loss": […]}.
                inner = values.items() if isinstance(values, dict) else [(None, values)]
                for part, numbers in inner:
                    yield from _series(f"{name}.{key}" if part is None else f"{name}.{key}.{part}", numbers)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for key in dict.fromkeys(k for v in value for k in v):
                yield from _series(f"{name}.{key}", [v.get(key) for v in value])
        else:
            yield from _series(name, value)


def _series(name: str, values: Any) -> Iterable[Series]:
    if not isinstance(values, list) or not values:
        return
    numbers = [as_number(v) for v in values]
    if any(n is None for n in numbers):
        return
    yield Series(name, tuple(n for n in numbers if n is not None), bool(_HELD_OUT.search(name)))


def held_out_loss(record: TrainingRecord, label: Optional[float]) -> Optional[Series]:
    """The held-out loss: the series whose best is the label if one is, else the first that is called a loss."""
    losses = [s for s in record.series if s.held_out and _LOSS.search(s.name)]
    for series in losses:
        if label is not None and close(min(series.values), label):
            return series
    named = [s for s in losses if re.search(r"\.(val_|valid_|validation_|total_)?loss$|^\w*loss(es)?$", s.name)]
    return next(iter(named or losses), None)


def close(left: float, right: float, relative: float = 1e-3) -> bool:
    """Equal as far as people round."""
    return math.isclose(left, right, rel_tol=relative, abs_tol=1e-12)
