"""The metrics of images and video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import products, ssim, statistics
from remote_payload.reconstruct.identification import identification_metrics
from remote_payload.reconstruct.measured import HIGHER, Evaluated, Metric, Source, baseline_rows, unmeasured
from remote_payload.reconstruct.protocol import Kind, Modality
from remote_payload.reconstruct.sample_metrics import sample_metric, similarity_metric
from remote_payload.reconstruct.statistics import Floats, Rows, RowsLike

_SSIM_NULL_ELEMENTS = 20_000_000


def image_metrics(evaluated: Evaluated) -> list[Metric]:
    """PSNR, SSIM, two-way identification in pixels and latents, and for video the frame-difference correlation."""
    found = [_psnr(evaluated), _ssim(evaluated)]
    found += identification_metrics(
        evaluated, "pixel_identification", evaluated.predictions, evaluated.targets, baseline_rows(evaluated), {}
    )
    found += latent_identification(evaluated)
    if evaluated.modality.kind is Kind.VIDEO:
        found.append(frame_difference_correlation(evaluated))
    return found


def latent_identification(evaluated: Evaluated) -> list[Metric]:
    """Two-way identification in the model's own latent: predictions' latents against targets'."""
    name = "latent_identification"
    if evaluated.latents is None:
        reason = "the adapter gives no latents of targets and predictions"
        return [unmeasured(evaluated, f"{name}_two_way", "share of pairs", HIGHER, reason)]
    wanted, given = evaluated.latents
    return identification_metrics(
        evaluated,
        name,
        given,
        wanted,
        {},
        {"space": "the model's latent"},
        no_baselines="the model's latents are had of its own outputs alone",
    )


def frames_of(modality: Modality, rows: Rows) -> NDArray[Any]:
    """`(b, frames, channels, h, w)` of rows `(b, d)`."""
    letters = "N" + modality.layout
    value = rows.reshape(-1, *modality.shape)
    for axis in "TC":
        if axis not in letters:
            value, letters = value[..., None], letters + axis
    return np.asarray(np.transpose(value, [letters.index(axis) for axis in "NTCHW"]))


def frame_difference_correlation(evaluated: Evaluated) -> Metric:
    """Correlation of the change from one frame to the next, over all pixels: does the reconstruction move as the film.

    Within samples that have several frames, else between samples that follow each other in one group.
    """
    name, modality = "frame_difference_correlation", evaluated.modality
    if "T" in modality.layout:
        if modality.shape[modality.layout.index("T")] < 2:
            return unmeasured(evaluated, name, "1", HIGHER, "a sample has one frame")

        def moves(rows: Rows) -> Rows:
            frames = frames_of(modality, rows)
            return np.diff(frames.astype(np.float64), axis=1).reshape(len(rows), -1)

        return sample_metric(
            evaluated,
            name,
            lambda given, wanted: statistics.row_correlations(moves(given), moves(wanted)),
            "1",
            HIGHER,
            "prediction or target does not move in any sample",
            {"between": "frames of a sample"},
        ).metric
    if not evaluated.ordered:
        return unmeasured(evaluated, name, "1", HIGHER, "a sample is one frame, and samples are in no order of time")
    starts = np.arange(len(evaluated.targets) - 1)
    if evaluated.groups:
        groups = np.array(evaluated.groups, dtype=np.str_)
        starts = starts[groups[:-1] == groups[1:]]
    if not len(starts):
        return unmeasured(evaluated, name, "1", HIGHER, "no sample follows another")

    def differences(rows: RowsLike) -> RowsLike:
        return _Differences(rows, starts)

    baselines = {n: differences(rows) for n, rows in baseline_rows(evaluated).items()}
    source = Source(differences(evaluated.predictions), differences(evaluated.targets), baselines)
    pixels = dataclasses.replace(modality, kind=Kind.IMAGE)
    found = similarity_metric(
        dataclasses.replace(evaluated, modality=pixels), name, None, {"between": "samples that follow"}, source
    ).metric
    if found.value is None:
        return dataclasses.replace(found, reason="prediction or target does not change between any two samples")
    return found


@dataclasses.dataclass(frozen=True)
class _Differences:
    """Row i: what `rows` change by after row `starts[i]`; made when asked for."""

    rows: RowsLike
    starts: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.starts), *self.rows.shape[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any, /) -> Any:
        chosen, columns = index if isinstance(index, tuple) else (index, slice(None))
        starts = self.starts[chosen]
        return np.asarray(self.rows[starts + 1, columns]).astype(np.float64) - self.rows[starts, columns]


def _psnr(evaluated: Evaluated) -> Metric:
    bounds = evaluated.modality.value_range
    if bounds is None:
        return unmeasured(evaluated, "psnr", "dB", HIGHER, "no range is declared, so there is no peak value")
    peak = bounds[1] - bounds[0]

    def decibels(errors: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            values = 10.0 * np.log10(peak**2 / errors)
        return np.where(np.isfinite(values), values, np.nan)

    return sample_metric(
        evaluated,
        "psnr",
        lambda given, wanted: decibels(statistics.squared_errors(given, wanted)),
        "dB",
        HIGHER,
        "every sample is exact: infinite",
        {"peak": peak},
        pairwise=lambda given, wanted: decibels(products.mean_squared_errors(given, wanted)),
    ).metric


def _ssim(evaluated: Evaluated) -> Metric:
    problem = _ssim_problem(evaluated.modality)
    bounds = evaluated.modality.value_range
    if problem is not None or bounds is None:
        return unmeasured(evaluated, "ssim", "1", HIGHER, problem or "")
    data_range = bounds[1] - bounds[0]

    # A block of targets is compared with the model's and every baseline's in turn: its own part is worked out once.
    last: list[tuple[Rows, ssim.Frames]] = []

    def planes(rows: Rows) -> NDArray[Any]:
        frames = frames_of(evaluated.modality, rows)
        return frames.reshape(-1, *frames.shape[3:])

    def score(given: Rows, wanted: Rows) -> Floats:
        if not last or last[0][0] is not wanted:
            last[:] = [(wanted, ssim.prepare(planes(wanted)))]
        found = ssim.compare(ssim.prepare(planes(given)), last[0][1], data_range)
        return np.asarray(found.reshape(len(given), -1).mean(axis=1))

    stated = {
        "window": "gaussian",
        "sigma_px": ssim.SIGMA,
        "window_px": 2 * ssim.RADIUS + 1,
        "k1": ssim.K1,
        "k2": ssim.K2,
        "data_range": data_range,
        "over": "whole windows; mean over channels and frames",
    }
    return sample_metric(
        evaluated, "ssim", score, "1", HIGHER, parameters=stated, null_elements=_SSIM_NULL_ELEMENTS
    ).metric


def _ssim_problem(modality: Modality) -> Optional[str]:
    if modality.value_range is None:
        return "no range is declared"
    sides: Sequence[int] = [modality.shape[modality.layout.index(axis)] for axis in "HW"]
    if min(sides) < 2 * ssim.RADIUS + 1:
        return f"a frame of {sides[0]} x {sides[1]} is smaller than the window of {2 * ssim.RADIUS + 1} pixels"
    return None
