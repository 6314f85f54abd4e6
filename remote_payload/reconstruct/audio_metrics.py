"""The metrics of sound: waveforms, mel spectrograms and codes."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.measured import HIGHER, LOWER, Evaluated, Evidence, Metric, unmeasured
from remote_payload.reconstruct.protocol import Modality
from remote_payload.reconstruct.sample_metrics import error_metric, rival_gains, sample_metric
from remote_payload.reconstruct.statistics import Floats, Rows

WINDOW_S, HOP_S = 0.032, 0.008
MEL_BANDS = 64
_FLOOR_DB = 80.0
_NULL_ELEMENTS = 40_000_000


def waveform_metrics(evaluated: Evaluated) -> list[Metric]:
    """SI-SDR, log-mel correlation and log-spectral distance of waveforms."""
    modality = evaluated.modality
    found = [sample_metric(evaluated, "si_sdr", si_sdr, "dB", HIGHER, "no finite ratio", {"mean_removed": True}).metric]
    spectral = (("log_mel_correlation", "1", HIGHER), ("log_spectral_distance", "dB", LOWER))
    window, hop = frame_sizes(modality)
    problem = _spectral_problem(modality, window)
    rate_hz = modality.sample_rate_hz
    if problem is not None or rate_hz is None:
        return found + [unmeasured(evaluated, name, unit, way, problem or "") for name, unit, way in spectral]
    bank = mel_bank(rate_hz, window, MEL_BANDS)

    def correlation(given: Rows, wanted: Rows) -> Floats:
        ours, theirs = (_log(power(signals(modality, r), window, hop) @ bank) for r in (given, wanted))
        return statistics.row_correlations(ours.reshape(len(given), -1), theirs.reshape(len(wanted), -1))

    def distance(given: Rows, wanted: Rows) -> Floats:
        first, second = (power(signals(modality, r), window, hop) for r in (given, wanted))
        return log_spectral_distance(first, second)

    stated = {
        "window_samples": window,
        "hop_samples": hop,
        "window": "periodic Hann, frames wholly inside",
        "floor_db": -_FLOOR_DB,
        "sample_rate_hz": rate_hz,
    }
    mel = {**stated, "mel_bands": MEL_BANDS, "mel_scale": "O'Shaughnessy (HTK)"}
    for (name, unit, way), score, more in zip(spectral, (correlation, distance), (mel, stated)):
        found.append(
            sample_metric(
                evaluated, name, score, unit, way, "no variance in any sample", more, null_elements=_NULL_ELEMENTS
            ).metric
        )
    return found


def mel_metrics(evaluated: Evaluated) -> list[Metric]:
    """The distance between spectra over bands, root mean square, mean over time; in the modality's own unit."""
    modality = evaluated.modality

    def score(given: Rows, wanted: Rows) -> Floats:
        difference = (given.astype(np.float64) - wanted).reshape(-1, *modality.shape)
        bands = 1 + modality.layout.index("M")
        return np.asarray(np.sqrt((difference**2).mean(axis=bands)).mean(axis=1))

    stated = {"over": "root mean square over bands, mean over time"}
    return [sample_metric(evaluated, "mel_spectral_distance", score, modality.unit, LOWER, parameters=stated).metric]


def si_sdr(given: Rows, wanted: Rows) -> Floats:
    """Scale-invariant signal-to-distortion ratio in dB of zero-mean signals (Le Roux et al., ICASSP 2019)."""
    estimate, target = given.astype(np.float64), wanted.astype(np.float64)
    estimate -= estimate.mean(axis=1, keepdims=True)
    target -= target.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = (estimate * target).sum(axis=1) / (target**2).sum(axis=1)
        kept = scale[:, None] * target
        ratio = 10.0 * np.log10((kept**2).sum(axis=1) / ((kept - estimate) ** 2).sum(axis=1))
    return np.asarray(np.where(np.isfinite(ratio), ratio, np.nan))


def signals(modality: Modality, rows: Rows) -> NDArray[Any]:
    """`(b, channels, T)` of rows `(b, d)`."""
    shaped = rows.reshape(-1, *modality.shape)
    if modality.layout == "T":
        return np.asarray(shaped[:, None])
    return np.asarray(shaped if modality.layout == "CT" else shaped.swapaxes(1, 2))


def frame_sizes(modality: Modality) -> tuple[int, int]:
    """Window and hop in samples; 0, 0 where no rate is declared."""
    rate_hz = modality.sample_rate_hz
    if rate_hz is None:
        return 0, 0
    return max(16, round(WINDOW_S * rate_hz)), max(4, round(HOP_S * rate_hz))


def power(waves: NDArray[Any], window: int, hop: int) -> Floats:
    """Short-time power spectra `(…, frames, window // 2 + 1)` of `(…, T)`, no padding, scaled by the window's sum."""
    frames = np.lib.stride_tricks.sliding_window_view(waves.astype(np.float64), window, axis=-1)[..., ::hop, :]
    shape = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    return np.asarray(np.abs(np.fft.rfft(frames * shape, axis=-1) / shape.sum()) ** 2)


def mel_bank(rate_hz: int, window: int, bands: int) -> Floats:
    """`(window // 2 + 1, bands)`: triangles equally wide in mel = 2595 log10(1 + f / 700), up to half the rate.

    A band between two bins takes the nearest one, so that no band is empty.
    """
    frequencies = np.arange(window // 2 + 1) * rate_hz / window
    edges = 700.0 * (
        10.0 ** (np.linspace(0.0, 2595.0 * np.log10(1.0 + rate_hz / 2.0 / 700.0), bands + 2) / 2595.0) - 1.0
    )
    rising = (frequencies[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - frequencies[:, None]) / (edges[2:] - edges[1:-1])
    bank = np.maximum(0.0, np.minimum(rising, falling))
    for band in np.flatnonzero(bank.sum(axis=0) == 0):
        bank[np.abs(frequencies - edges[band + 1]).argmin(), band] = 1.0
    return np.asarray(bank)


def log_spectral_distance(first: Floats, second: Floats) -> Floats:
    """Root mean square over frequency of the difference in dB, mean over frames and channels; powers `(b, …, f)`.

    Gray & Markel 1976. Powers are floored 80 dB under the second's largest: silence has no logarithm.
    """
    floor = second.max(axis=tuple(range(1, second.ndim)), keepdims=True) * 10.0 ** (-_FLOOR_DB / 10.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ours, theirs = (10.0 * np.log10(np.maximum(p, floor)) for p in (first, second))
        distance = np.sqrt(((ours - theirs) ** 2).mean(axis=-1))
    result = distance.reshape(len(first), -1).mean(axis=1)
    return np.asarray(np.where(np.isfinite(result), result, np.nan))


def code_metrics(evaluated: Evaluated) -> tuple[list[Metric], Evidence]:
    """Accuracy over all codebooks and per codebook; chance is the frequency of each book's commonest code."""
    modality = evaluated.modality
    axis = 1 + modality.layout.index("K")
    books = modality.shape[modality.layout.index("K")]

    def shaped(rows: Any) -> NDArray[np.int64]:
        codes = np.rint(np.asarray(rows)).astype(np.int64).reshape(-1, *modality.shape)
        return np.asarray(np.moveaxis(codes, axis, 1))

    def accuracy(book: Optional[int]) -> Any:
        def score(given: Rows, wanted: Rows) -> Floats:
            hits = shaped(given) == shaped(wanted)
            return np.asarray((hits if book is None else hits[:, book]).reshape(len(hits), -1).mean(axis=1))

        return score

    frequencies, constant = _commonest_frequencies(evaluated, shaped, books)
    overall = sample_metric(evaluated, "code_accuracy", accuracy(None), "share of codes", HIGHER)
    metrics = [overall.metric]
    metrics += [
        sample_metric(
            evaluated, f"code_accuracy_codebook_{k}", accuracy(k), "share of codes", HIGHER, parameters={"codebook": k}
        ).metric
        for k in range(books)
    ]
    chances = [float(frequencies.mean()), *(float(f) for f in frequencies)]
    known = [None] * (books + 1) if constant is None else [float(constant.mean()), *constant.mean(axis=0).tolist()]
    told = [_with_chance(m, c, k) for m, c, k in zip(metrics, chances, known)]
    error, _ = error_metric(evaluated, "code_mse")
    gain = None
    if constant is not None:
        gain = statistics.mean_interval(overall.values - constant.mean(axis=1), evaluated.dependence, evaluated.seed)
    evidence = Evidence(
        modality,
        len(overall.values),
        told[0],
        "train_commonest_code",
        gain,
        told[0],
        overall.null,
        None,
        rival_gains(evaluated, overall, 1.0),
        evaluated.copies,
    )
    return [*told, error.metric], evidence


def _commonest_frequencies(evaluated: Evaluated, shaped: Any, books: int) -> tuple[Floats, Optional[Floats]]:
    """Frequency of each book's commonest code, and how often training's commonest code is right `(n, books)`."""
    counts: list[dict[int, int]] = [{} for _ in range(books)]
    total = 0
    constant = None if evaluated.commonest_codes is None else np.empty((len(evaluated.targets), books))
    step = max(1, 4_000_000 // evaluated.targets.shape[1])
    for start in range(0, len(evaluated.targets), step):
        codes = shaped(evaluated.targets[start : start + step])
        total += codes.shape[0] * codes.shape[2]
        for book in range(books):
            for code, count in zip(*np.unique(codes[:, book], return_counts=True)):
                counts[book][int(code)] = counts[book].get(int(code), 0) + int(count)
        if constant is not None and evaluated.commonest_codes is not None:
            constant[start : start + step] = (codes == evaluated.commonest_codes[:, None]).mean(axis=2)
    return np.array([max(c.values()) / total for c in counts]), constant


def _with_chance(found: Metric, chance: float, constant: Optional[float]) -> Metric:
    baselines = dict(found.baselines) if constant is None else {**found.baselines, "train_commonest_code": constant}
    stated = {**found.parameters, "chance": "frequency of the commonest code of each book"}
    return dataclasses.replace(found, chance=chance, baselines=baselines, parameters=stated)


def _log(powers: Floats) -> Floats:
    floor = powers.max(axis=tuple(range(1, powers.ndim)), keepdims=True) * 10.0 ** (-_FLOOR_DB / 10.0)
    with np.errstate(divide="ignore"):
        logs = 10.0 * np.log10(np.maximum(powers, floor))
    return np.asarray(np.where(np.isfinite(logs), logs, 0.0))


def _spectral_problem(modality: Modality, window: int) -> Optional[str]:
    if modality.sample_rate_hz is None:
        return "no sample rate is declared"
    length = modality.shape[modality.layout.index("T")]
    return f"a sample of {length} is shorter than the window of {window}" if length < window else None
