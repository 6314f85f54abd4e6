"""What a checkpoint says about its own training: labels, counters, histories, learning rates. Pure."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader, Role

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
    def batches_per_epoch(self) -> Optional[int]:
        """Known if the histories' epochs divide the batches."""
        if not self.batches or not self.history_epochs or self.batches % self.history_epochs:
            return None
        return self.batches // self.history_epochs


def training_record(header: CheckpointHeader) -> TrainingRecord:
    """Collect what is there; what is not is None."""
    counters = [t.value for t in header.model_tensors() if t.role is Role.COUNTER and isinstance(t.value, int)]
    steps = [int(s) for s in header.optimizer.steps] if header.optimizer else []
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
            filter(None, [_learning_rate(header, ("initial_lr", "lr")), config_number(header, "lr")]), default=None
        ),
    )


def usual_count(counters: Iterable[int]) -> Optional[int]:
    """What most layers counted; of equally frequent numbers the smaller, since some layers count twice."""
    frequency = Counter(counters)
    if not frequency:
        return None
    most = max(frequency.values())
    return min(v for v, n in frequency.items() if n == most)


_CONFIG_NAMES = {
    "lr": ("learning_rate", "lr", "base_lr", "max_lr"),
    "min_lr": ("min_lr", "eta_min", "lr_min", "min_learning_rate"),
    "epochs": ("num_epochs", "max_epochs", "epochs", "n_epochs"),
    "warmup_epochs": ("warmup_epochs", "num_warmup_epochs"),
    "warmup_steps": ("warmup_steps", "num_warmup_steps"),
    "batch_size": ("batch_size", "per_device_batch_size", "train_batch_size", "batch_size_per_gpu"),
}


def config_number(header: CheckpointHeader, what: str) -> Optional[float]:
    """A number from the config under one of its usual names, one level of sections deep."""
    sections = [header.config, *(v for v in header.config.values() if isinstance(v, dict))]
    for name in _CONFIG_NAMES[what]:
        for section in sections:
            number = as_number(section.get(name))
            if number is not None:
                return number
    return None


def config_text(header: CheckpointHeader, names: tuple[str, ...]) -> str:
    """A text from the config in lower case, empty if there is none."""
    for name in names:
        if isinstance(header.config.get(name), str):
            return str(header.config[name]).lower()
    return ""


def as_number(value: Any) -> Optional[float]:
    """A finite number, None for anything else; a bool is no number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


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
                yield from _series(f"{name}.{key}", values)
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
