"""Structural similarity (Wang, Bovik, Sheikh & Simoncelli 2004) with the paper's Gaussian window."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SIGMA = 1.5
RADIUS = 5
"""The window is cut at 3.5 sigma: 11 pixels across."""
K1, K2 = 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames `(n, h, w)` on the device with their local means and variances, to be compared with several others."""

    values: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    windows: tuple[torch.Tensor, torch.Tensor]

    def smooth(self, values: torch.Tensor) -> torch.Tensor:
        down, along = self.windows
        return down.T @ values @ along


def prepare(frames: NDArray[Any]) -> Frames:
    """Raises `ValueError` for frames smaller than the window."""
    height, width = frames.shape[1:]
    if min(height, width) < 2 * RADIUS + 1:
        raise ValueError(f"frames of {height} x {width} are smaller than the window of {2 * RADIUS + 1}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = torch.from_numpy(np.ascontiguousarray(frames)).to(device).double()
    down, along = _windows(height, device), _windows(width, device)
    mean = down.T @ values @ along
    return Frames(values, mean, down.T @ (values * values) @ along - mean * mean, (down, along))


def compare(first: Frames, second: Frames, data_range: float) -> NDArray[np.float64]:
    """`(n,)`: the mean of each pair's SSIM map where the window lies wholly inside; float64."""
    means = first.mean * second.mean
    covariance = first.smooth(first.values * second.values) - means
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * means + c1) * (2 * covariance + c2)
    below = (first.mean * first.mean + second.mean * second.mean + c1) * (first.variance + second.variance + c2)
    result: NDArray[np.float64] = (above / below).mean(dim=(1, 2)).cpu().numpy()
    return result


def ssim(first: NDArray[Any], second: NDArray[Any], data_range: float) -> NDArray[np.float64]:
    """`(n,)` of frames `(n, h, w)`. Raises `ValueError` for frames smaller than the window."""
    return compare(prepare(first), prepare(second), data_range)


def _windows(size: int, device: torch.device) -> torch.Tensor:
    """`(size, size - 2 * RADIUS)`: a column is the window at one place, so filtering is a product of matrices."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    windows = np.zeros((size, size - 2 * RADIUS))
    for place in range(size - 2 * RADIUS):
        windows[place : place + len(weights), place] = weights
    return torch.from_numpy(windows).to(device)
