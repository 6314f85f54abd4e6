"""Metrics in the features of pretrained networks that the user names; nothing is ever fetched.

A network is a TorchScript file on the node. `compares: features` (the default): `forward(images)` of `(N, 3, H, W)`
gives a tensor `(N, …)` or a dict of such by layer. `compares: pairs`: `forward(given, wanted)` gives a distance `(N,)`,
as LPIPS does. TorchScript is a program and runs with the job's rights, as the adapter does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from remote_payload.reconstruct import statistics
from remote_payload.reconstruct.identification import identification_metrics
from remote_payload.reconstruct.image_metrics import frames_of
from remote_payload.reconstruct.measured import (
    HIGHER,
    LOWER,
    REARRANGED,
    Evaluated,
    Metric,
    baseline_rows,
    metric,
    unmeasured,
)
from remote_payload.reconstruct.statistics import Floats, RowsLike
from remote_payload.wire.names import printable

USUAL = ("alexnet_2", "alexnet_5", "inception", "clip", "effnet", "swav", "lpips", "fid")
"""What the field reports; each that no named network covers is listed as not measured."""
_BATCH = 32
_MOST_SAMPLES = 500
_MOST_WIDTH = 200_000
_FRECHET_WIDTH = 2048
_UNNAMED = "no network for it is named in the config (`features:`), and none is ever fetched"


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network to compare images by.

    `layers` empty: all that it gives. `size` `(H, W)` is what its input is resized to, None: as it is. Images are
    scaled from the declared range to 0…1, then `mean` and `std` are applied by channel. `frechet`: the distance between
    the distributions of features too (FID for Inception's). `covers`: which of `USUAL` it stands for.
    """

    name: str
    path: str
    layers: tuple[str, ...] = ()
    size: Optional[tuple[int, int]] = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    compares: str = "features"
    frechet: bool = False
    covers: tuple[str, ...] = ()


class FeatureError(Exception):
    """The named network cannot be used; the message says why, and becomes the reason of its metrics."""


def extractors_of(features: Mapping[str, Mapping[str, Any]]) -> tuple[Extractor, ...]:
    """The config's `features:` by name."""
    return tuple(
        Extractor(
            name=name,
            path=str(given["path"]),
            layers=tuple(given.get("layers") or ()),
            size=tuple(given["size"]) if given.get("size") else None,
            mean=tuple(given.get("mean") or (0.0,)),
            std=tuple(given.get("std") or (1.0,)),
            compares=given.get("compares") or "features",
            frechet=bool(given.get("frechet")),
            covers=tuple(given.get("covers") or ()),
        )
        for name, given in features.items()
    )


def feature_metrics(evaluated: Evaluated, extractors: Sequence[Extractor]) -> list[Metric]:
    """The metrics of every named network, then what the field reports and nothing was named for."""
    found: list[Metric] = []
    covered: set[str] = set()
    for extractor in extractors:
        covered.update((extractor.name, *extractor.covers))
        try:
            found += _measured_by(evaluated, extractor)
        except FeatureError as error:
            found.append(unmeasured(evaluated, f"feature_{extractor.name}", "1", HIGHER, str(error)))
    return found + [
        unmeasured(evaluated, f"feature_{name}", "1", LOWER if name in ("lpips", "fid") else HIGHER, _UNNAMED)
        for name in USUAL
        if name not in covered
    ]


def frechet_distance(first: Floats, second: Floats) -> float:
    """Squared Fréchet distance of two normal distributions fitted to rows `(n, d)` (Heusel et al. 2017).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½); the root's trace from singular values of the product of the centred data.
    """
    a, b = first - first.mean(axis=0), second - second.mean(axis=0)
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)
    # The eigenvalues of C1 C2 are the squared singular values of a b^T: no root of a singular matrix is needed.
    root = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    apart = float(((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum())
    return max(0.0, apart + float((a**2).sum() + (b**2).sum()) - 2.0 * root)


def _measured_by(evaluated: Evaluated, extractor: Extractor) -> list[Metric]:
    if evaluated.modality.value_range is None:
        raise FeatureError("no range is declared, so images cannot be scaled for the network")
    network = _Network(evaluated, extractor)
    step = -(-len(evaluated.targets) // _MOST_SAMPLES)
    rows = np.arange(0, len(evaluated.targets), step)
    subset = _subset(evaluated, rows, step)
    stated: dict[str, Any] = {
        "network": extractor.name,
        "file_sha256": network.sha256,
        "frames": "first of a sample" if "T" in evaluated.modality.layout else "all",
        "of_every": step,
    }
    if extractor.compares == "pairs":
        return [_pair_distance(evaluated, subset, extractor, network, rows, stated)]
    wanted = network.features(evaluated.targets, rows)
    given = network.features(evaluated.predictions, rows)
    baselines = {n: network.features(r, rows) for n, r in baseline_rows(evaluated).items()}
    missing = [layer for layer in extractor.layers if layer not in wanted]
    if missing:
        raise FeatureError(f"{extractor.name} gives {', '.join(sorted(wanted))}; not {', '.join(missing)}")
    found: list[Metric] = []
    for layer in extractor.layers or tuple(sorted(wanted)):
        name = f"feature_{extractor.name}" + (f"_{layer}" if len(wanted) > 1 or extractor.layers else "")
        theirs: dict[str, RowsLike] = {n: f[layer] for n, f in baselines.items()}
        more = {**stated, "layer": layer}
        found += identification_metrics(subset, name, given[layer], wanted[layer], theirs, more)
        found.append(_feature_distance(subset, name, given[layer], wanted[layer], theirs, more))
        if extractor.frechet:
            found.append(_frechet(subset, name, given[layer], wanted[layer], theirs, more))
    return found


def _subset(evaluated: Evaluated, rows: NDArray[np.int64], step: int) -> Evaluated:
    def of(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[row] for row in rows) if names else ()

    return dataclasses.replace(
        evaluated,
        targets=evaluated.targets[::step],
        predictions=evaluated.predictions[::step],
        baselines={},
        latents=None,
        training_targets=None,
        dependence=-(-evaluated.dependence // step),
        groups=of(evaluated.groups),
        stimuli=of(evaluated.stimuli),
        subjects=of(evaluated.subjects),
    )


class _Network:
    """The opened TorchScript file. Raises `FeatureError` where it cannot be opened or does not give what it should."""

    def __init__(self, evaluated: Evaluated, extractor: Extractor) -> None:
        self._modality = evaluated.modality
        self._extractor = extractor
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        path = os.path.expanduser(extractor.path)
        if not os.path.isfile(path):
            raise FeatureError(f"there is no file {printable(extractor.path)} on the node")
        self.sha256 = _digest(path)
        try:
            self._module = torch.jit.load(path, map_location=self.device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            raise FeatureError(f"{printable(extractor.path)} is no TorchScript file: {_line(error)}") from error

    def features(self, rows: RowsLike, chosen: NDArray[np.int64]) -> dict[str, Floats]:
        """Layer to `(m, f)` of the chosen samples."""
        parts: dict[str, list[Floats]] = {}
        for start in range(0, len(chosen), _BATCH):
            images = self._images(rows, chosen[start : start + _BATCH])
            given = self._call(images)
            layers = given if isinstance(given, dict) else {"output": given}
            for layer, value in layers.items():
                if not isinstance(value, torch.Tensor) or value.shape[:1] != images.shape[:1]:
                    raise FeatureError(f"{self._extractor.name} gives no tensor with a row for each image")
                flat = value.reshape(len(images), -1)
                if flat.shape[1] > _MOST_WIDTH:
                    # Evenly spaced units keep the pairs comparable and the memory bounded.
                    flat = flat[:, :: -(-flat.shape[1] // _MOST_WIDTH)]
                parts.setdefault(str(layer), []).append(flat.double().cpu().numpy())
        return {layer: np.concatenate(values) for layer, values in parts.items()}

    def distances(self, given: RowsLike, wanted: RowsLike, mine: NDArray[np.int64], its: NDArray[np.int64]) -> Floats:
        """`(m,)`: the network's distance of each pair."""
        found = []
        for start in range(0, len(mine), _BATCH):
            block = slice(start, start + _BATCH)
            value = self._call(self._images(given, mine[block]), self._images(wanted, its[block]))
            if not isinstance(value, torch.Tensor) or value.numel() != len(mine[block]):
                raise FeatureError(f"{self._extractor.name} gives no distance for each pair")
            found.append(value.reshape(-1).double().cpu().numpy())
        return np.concatenate(found)

    def _call(self, *images: torch.Tensor) -> Any:
        try:
            with torch.inference_mode():
                return self._module(*images)
        except RuntimeError as error:
            raise FeatureError(f"{self._extractor.name} failed: {_line(error)}") from error

    def _images(self, rows: RowsLike, chosen: NDArray[np.int64]) -> torch.Tensor:
        """`(b, 3, H, W)` float32; of several frames the first, of one channel three equal ones."""
        low, high = self._modality.value_range or (0.0, 1.0)
        frames = frames_of(self._modality, np.asarray(rows[chosen]))[:, 0]
        images = (torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).float() - low) / (high - low)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self._extractor.size is not None:
            images = torch.nn.functional.interpolate(
                images, size=self._extractor.size, mode="bilinear", align_corners=False, antialias=True
            )
        mean, std = (
            torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (self._extractor.mean, self._extractor.std)
        )
        return (images - mean) / std


def _pair_distance(
    evaluated: Evaluated,
    subset: Evaluated,
    extractor: Extractor,
    network: _Network,
    rows: NDArray[np.int64],
    stated: Mapping[str, Any],
) -> Metric:
    places = np.arange(len(rows))
    values = network.distances(subset.predictions, subset.targets, places, places)
    _, indices = statistics.pairings(len(rows), subset.dependence, subset.ordered, 3, subset.seed)
    wrong = [float(network.distances(subset.predictions, subset.targets, places, i).mean()) for i in indices]
    theirs = {n: network.distances(r, evaluated.targets, rows, rows) for n, r in baseline_rows(evaluated).items()}
    return metric(
        subset,
        f"feature_{extractor.name}",
        float(values.mean()) if np.isfinite(values).all() else None,
        "1",
        LOWER,
        len(values),
        "the network gives distances that are not finite",
        chance=float(np.mean(wrong)) if wrong and np.isfinite(wrong).all() else None,
        interval=statistics.mean_interval(values, subset.dependence, subset.seed),
        baselines={n: float(v.mean()) if np.isfinite(v).all() else None for n, v in theirs.items()},
        parameters=dict(stated),
    )


def _feature_distance(
    subset: Evaluated,
    name: str,
    given: Floats,
    wanted: Floats,
    baselines: Mapping[str, RowsLike],
    stated: Mapping[str, Any],
) -> Metric:
    """1 - Pearson between the features of a prediction and of its target, mean over samples."""
    values = 1.0 - statistics.row_correlations(given, wanted)
    kept = values[np.isfinite(values)]
    _, indices = statistics.pairings(len(wanted), subset.dependence, subset.ordered, 20, subset.seed)
    wrong = [1.0 - statistics.row_correlations(given, wanted[i]) for i in indices]
    means = [float(w[np.isfinite(w)].mean()) for w in wrong if np.isfinite(w).any()]
    theirs = {n: 1.0 - statistics.scores(statistics.row_correlations, rows, wanted) for n, rows in baselines.items()}
    return metric(
        subset,
        f"{name}_distance",
        float(kept.mean()) if len(kept) else None,
        "1",
        LOWER,
        len(kept),
        "features have no variance",
        chance=float(np.mean(means)) if means else None,
        interval=statistics.mean_interval(values, subset.dependence, subset.seed),
        baselines={n: float(v[np.isfinite(v)].mean()) if np.isfinite(v).any() else None for n, v in theirs.items()},
        parameters={**stated, "distance": "1 - Pearson over features"},
    )


def _frechet(
    subset: Evaluated,
    name: str,
    given: Floats,
    wanted: Floats,
    baselines: Mapping[str, RowsLike],
    stated: Mapping[str, Any],
) -> Metric:
    title = f"{name}_frechet_distance"
    if len(wanted) < 2 or wanted.shape[1] > _FRECHET_WIDTH:
        reason = f"it needs two samples and at most {_FRECHET_WIDTH} features; there are {wanted.shape}"
        return unmeasured(subset, title, "1", LOWER, reason)
    theirs: dict[str, Optional[float]] = {}
    reasons = dict(subset.no_baselines)
    for baseline, rows in baselines.items():
        if baseline in REARRANGED:
            reasons[baseline] = "it gives the targets themselves, which have the targets' distribution"
        else:
            theirs[baseline] = frechet_distance(np.asarray(rows[:]), wanted)
    subset = dataclasses.replace(subset, no_baselines=reasons)
    more = {**stated, "samples": len(wanted), "biased_by_few_samples": len(wanted) < 10 * wanted.shape[1]}
    return metric(
        subset, title, frechet_distance(given, wanted), "1", LOWER, len(wanted), "", baselines=theirs, parameters=more
    )


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return printable(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__)[:300]
