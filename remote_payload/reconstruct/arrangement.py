"""Would predictions fit their targets far better with their axes, channels or scale otherwise than declared?

A model that was trained on BGR, on frames laid out channel first, or on data divided by 255 twice gives outputs of the
right shape and of no use. Metrics would only say that it is bad; this says why.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.wire.results import Finding, Severity

Array = NDArray[Any]

_FEWEST_SAMPLES = 8
_MOST_SAMPLES = 64
_MOST_ELEMENTS = 8_000_000
_MOST_CHANNELS = 4
_AXIS_NAMES = {
    "T": "time",
    "H": "height",
    "W": "width",
    "C": "channel",
    "M": "band",
    "K": "codebook",
    "S": "segment",
    "D": "dimension",
}
_LEFT_OF_ERROR = 0.9
"""An arrangement is believed if it leaves less than this share of the error, in nearly every sample …"""
_SAMPLES_THAT_AGREE = 0.95
_CORRELATION_GAIN = 0.02
"""… and what changes from sample to sample is followed better."""
_TRACKS = 0.1
"""Correlation over samples below which a model follows nothing."""
_LEFT_OF_ERROR_BY_SCALE = 0.3
_FAR_FROM_MEAN, _NEAR_MEAN = 2.0, 1.5
"""A scale is believed if the error falls from far above that of the mean to about it, and the slope of targets over
outputs comes out near 1."""
_SLOPES = (0.25, 4.0)
_BELOW_ZERO = -0.25
_UNARRANGED = (Kind.VOXELS, Kind.CODES)
"""One axis; and whole numbers whose squared differences mean little."""


@dataclasses.dataclass(frozen=True)
class _Arrangement:
    """`words` end the sentence "outputs fit their targets …". `view` leaves of both what it is to be judged by."""

    finding_id: str
    words: str
    evidence: dict[str, Any]
    apply: Callable[[Array], Array]
    is_scale: bool = False
    view: Optional[Callable[[Array], Array]] = None


@dataclasses.dataclass(frozen=True)
class _Fit:
    """Squared error `(n,)` of each sample; correlation, and slope of targets over outputs, of what changes from sample
    to sample."""

    errors: Array
    correlation: float
    slope: float

    @property
    def error(self) -> float:
        return float(self.errors.mean())


def arrangement_finding(
    modality: Modality, targets: Array, predictions: Array, train_mean: Optional[Array] = None
) -> Optional[Finding]:
    """The rearrangement of `predictions` `(n, d)` that makes them fit `targets` `(n, d)` far better, if there is one.

    None for fewer than 8 samples, and for outputs that do not change from sample to sample.
    """
    if modality.kind in _UNARRANGED or len(targets) < _FEWEST_SAMPLES:
        return None
    rows = _some_rows(len(targets), targets.shape[1])
    shape = (len(rows), *modality.shape)
    wanted = np.asarray(targets[rows], dtype=np.float64).reshape(shape)
    given = np.asarray(predictions[rows], dtype=np.float64).reshape(shape)
    declared = _fit(wanted, given)
    if not np.isfinite(declared.correlation):
        return None
    mean = wanted.mean(axis=0) if train_mean is None else train_mean.reshape(modality.shape)
    of_mean = float(np.square(wanted - mean).mean())
    believed = []
    for arrangement in _arrangements(modality, wanted, given):
        fit = _fit(wanted, arrangement.apply(given))
        if arrangement.view is None:
            is_better = _is_believed(arrangement, declared, fit, of_mean)
        else:
            seen = [arrangement.view(x) for x in (wanted, given, arrangement.apply(given))]
            is_better = _is_believed(arrangement, _fit(seen[0], seen[1]), _fit(seen[0], seen[2]), of_mean)
        if is_better:
            believed.append((arrangement, fit))
    if not believed:
        return None
    arrangement, fit = min(believed, key=lambda pair: pair[1].error)
    return Finding(
        id=arrangement.finding_id,
        severity=Severity.ERROR,
        title=f"Outputs of {modality.name} fit their targets {arrangement.words}, not as declared",
        where=(modality.name,),
        evidence={
            **arrangement.evidence,
            "mse_as_declared": declared.error,
            "mse_rearranged": fit.error,
            "mse_of_mean": of_mean,
            "correlation_as_declared": declared.correlation,
            "correlation_rearranged": fit.correlation,
            "n": len(rows),
        },
        explanation="No metric of this modality would mean anything, so none is computed.",
        confidence=0.95,
        refuted_by="Data in which the two arrangements are told apart by eye, and the declared one is right.",
        action="Mend the adapter's predict or its targets, or the declared layout; or evaluate the model on data that "
        "are laid out as those it was trained on.",
    )


def _is_believed(arrangement: _Arrangement, declared: _Fit, fit: _Fit, of_mean: float) -> bool:
    if np.mean(fit.errors < declared.errors) < _SAMPLES_THAT_AGREE:
        return False
    if arrangement.is_scale:
        # A scale leaves the correlation as it is; what is constant or noise would only come nearer to the mean.
        falls = fit.error <= min(_LEFT_OF_ERROR_BY_SCALE * declared.error, _NEAR_MEAN * of_mean)
        is_near = _SLOPES[0] <= fit.slope <= _SLOPES[1]
        return falls and is_near and fit.correlation > _TRACKS and declared.error >= _FAR_FROM_MEAN * of_mean
    gains = fit.correlation > max(_TRACKS, declared.correlation + _CORRELATION_GAIN)
    return gains and fit.error <= _LEFT_OF_ERROR * declared.error


def _fit(wanted: Array, given: Array) -> _Fit:
    axes = tuple(range(1, wanted.ndim))
    errors = np.square(wanted - given).mean(axis=axes)
    a, b = wanted - wanted.mean(axis=0), given - given.mean(axis=0)
    product, of_given = float((a * b).sum()), float(np.square(b).sum())
    size = float(np.sqrt(np.square(a).sum() * of_given))
    if not size > 0:
        return _Fit(errors, float("nan"), float("nan"))
    return _Fit(errors, product / size, product / of_given)


def _some_rows(count: int, width: int) -> NDArray[np.int64]:
    wanted = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, _MOST_ELEMENTS // max(1, width)))
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def _arrangements(modality: Modality, wanted: Array, given: Array) -> Iterator[_Arrangement]:
    yield from _axis_orders(modality)
    if modality.kind in (Kind.IMAGE, Kind.VIDEO):
        yield from _channel_orders(modality)
        yield from _flips(modality)
    yield from _scales(wanted, given)


def _axis_orders(modality: Modality) -> Iterator[_Arrangement]:
    """The same buffer with its axes in another order."""
    layout, shape = modality.layout, modality.shape
    for order in itertools.permutations(range(len(shape))):
        # Moving an axis of one element moves no element.
        if [o for o in order if shape[o] > 1] == [o for o in range(len(shape)) if shape[o] > 1]:
            continue
        back = tuple(1 + order.index(axis) for axis in range(len(shape)))
        stored = tuple(shape[axis] for axis in order)
        name = "".join(layout[axis] for axis in order)
        words = f"with their axes in the order {', '.join(_AXIS_NAMES.get(letter, letter) for letter in name)}"
        yield _Arrangement(
            "reconstruct.layout_mismatch",
            words,
            {"declared_layout": layout, "fitting_layout": name},
            lambda x, stored=stored, back=back: x.reshape(len(x), *stored).transpose(0, *back),  # type: ignore[misc]
        )


def _channel_orders(modality: Modality) -> Iterator[_Arrangement]:
    if "C" not in modality.layout:
        return
    axis = modality.layout.index("C")
    count = modality.shape[axis]
    if not 2 <= count <= _MOST_CHANNELS:
        return
    for order in itertools.permutations(range(count)):
        if order != tuple(range(count)):
            yield _Arrangement(
                "reconstruct.channels_swapped",
                f"with their channels in the order {_channel_words(order)}",
                {"fitting_channel_order": list(order)},
                lambda x, order=order, axis=axis + 1: np.take(x, order, axis=axis),  # type: ignore[misc]
                # By colour alone: brightness is the same in every order, and most of what frames differ in.
                view=lambda x, axis=axis + 1: x - x.mean(axis=axis, keepdims=True),  # type: ignore[misc]
            )


def _channel_words(order: Sequence[int]) -> str:
    return "blue, green, red" if list(order) == [2, 1, 0] else ", ".join(str(channel) for channel in order)


def _flips(modality: Modality) -> Iterator[_Arrangement]:
    for letter, words in (("H", "upside down"), ("W", "mirrored")):
        if letter in modality.layout:
            axis = modality.layout.index(letter) + 1
            yield _Arrangement(
                "reconstruct.layout_mismatch",
                words,
                {"declared_layout": modality.layout, "flipped_axis": letter},
                lambda x, axis=axis: np.flip(x, axis=axis),  # type: ignore[misc]
            )


def _scales(wanted: Array, given: Array) -> Iterator[_Arrangement]:
    def scale(words: str, factor: float, offset: float = 0.0) -> _Arrangement:
        evidence = {"fitting_scale": factor, "fitting_offset": offset}
        return _Arrangement("reconstruct.range_mismatch", words, evidence, lambda x: x * factor + offset, is_scale=True)

    yield scale("multiplied by 255", 255.0)
    yield scale("divided by 255", 1 / 255.0)
    if given.min() < _BELOW_ZERO <= wanted.min():
        yield scale("taken from -1…1 to 0…1", 0.5, 0.5)
    if wanted.min() < _BELOW_ZERO <= given.min():
        yield scale("taken from 0…1 to -1…1", 2.0, -1.0)
