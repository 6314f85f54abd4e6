"""Do targets and predictions hold what the adapter declares: shape, range, finite numbers. Before any metric."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.protocol import AdapterError, Modality
from remote_payload.wire.results import Dimension, Finding, Severity

_TOLERATED = 0.01
"""Share of the declared span by which a value may lie outside: interpolation and bf16 do that much."""
_OVERSHOOT = 0.25
_CANNOT_MATCH = 0.05
"""Predictions that stay in 0…1 and span less than this share of the targets' span come from a head of that range."""


def check_shape(what: str, modality: Modality, array: NDArray[Any], count: Optional[int] = None) -> None:
    """Raise `AdapterError` unless `array` is one sample (`count` None) or `count` samples of the declared shape."""
    wanted = modality.shape if count is None else (count, *modality.shape)
    if tuple(array.shape) != wanted:
        axes = modality.layout if count is None else f"N{modality.layout}"
        raise AdapterError(
            f"the {what} of {modality.name!r} has shape {tuple(array.shape)}; declared is {wanted} in the layout {axes}"
        )


def target_finding(modality: Modality, targets: NDArray[Any]) -> Optional[Finding]:
    """The data's values against the declared range, and codes against whole numbers."""
    if not np.isfinite(targets).all():
        return _mismatch(modality, "Targets of {name} hold NaN or infinity", {}, "Mend or leave out these samples.")
    if modality.value_range is None or not targets.size:
        return None
    low, high = modality.value_range
    seen = (float(targets.min()), float(targets.max()))
    slack = _TOLERATED * (high - low)
    if seen[0] >= low - slack and seen[1] <= high + slack:
        return None
    return _mismatch(
        modality,
        "Targets of {name} are not in the declared range",
        {"declared": [low, high], "targets": list(seen)},
        "Declare the range that the data have, or scale the data as the model was trained on them.",
    )


def prediction_finding(modality: Modality, targets: NDArray[Any], predictions: NDArray[Any]) -> Optional[Finding]:
    """An output that cannot match its target, as a sigmoid head against 0…255 data; or one far outside the range."""
    seen = (float(predictions.min()), float(predictions.max()))
    wanted = (float(targets.min()), float(targets.max()))
    in_unit = seen[0] >= -1e-3 and seen[1] <= 1.0 + 1e-3
    if in_unit and wanted[1] > 2.0 and seen[1] - seen[0] < _CANNOT_MATCH * (wanted[1] - wanted[0]):
        return _mismatch(
            modality,
            "{name} is given in 0…1 and its targets are not",
            {"predictions": list(seen), "targets": list(wanted)},
            "Scale the one or the other in the adapter: a sigmoid's output cannot match data of 0…255.",
        )
    if modality.value_range is None:
        return None
    low, high = modality.value_range
    span = high - low
    if wanted[1] <= 1.0 + 1e-3 and low >= 0 and seen[1] > 20.0 * max(high, 1e-9):
        return _mismatch(
            modality,
            "{name} is given on another scale than its targets",
            {"predictions": list(seen), "targets": list(wanted), "declared": [low, high]},
            "Scale the one or the other in the adapter.",
        )
    if seen[0] < low - _OVERSHOOT * span or seen[1] > high + _OVERSHOOT * span:
        return Finding(
            id="reconstruct.out_of_range",
            severity=Severity.WARNING,
            title=f"Predictions of {modality.name} leave the declared range",
            dimension=Dimension.TASK_EVIDENCE,
            where=(modality.name,),
            evidence={"declared": [low, high], "predictions": list(seen)},
            explanation="They are scored as they are.",
            action="Check the last layer and the range that the adapter declares.",
        )
    return None


def non_finite_finding(modality: Modality, predictions: NDArray[Any]) -> Optional[Finding]:
    bad = ~np.isfinite(predictions)
    if not bad.any():
        return None
    return Finding(
        id="task.non_finite_output",
        severity=Severity.ERROR,
        title=f"Predictions of {modality.name} hold NaN or infinity",
        dimension=Dimension.TASK_EVIDENCE,
        where=(modality.name,),
        evidence={"share": float(bad.mean()), "samples": int(bad.any(axis=tuple(range(1, bad.ndim))).sum())},
        action="Look at the health job's numerics; try dtype: float32.",
    )


def _mismatch(modality: Modality, title: str, evidence: dict[str, Any], action: str) -> Finding:
    return Finding(
        id="reconstruct.range_mismatch",
        severity=Severity.ERROR,
        title=title.format(name=modality.name),
        where=(modality.name,),
        evidence=evidence,
        explanation="No metric of this modality would mean anything, so none is computed.",
        action=action,
    )
