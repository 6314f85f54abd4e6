"""Structural similarity (Wang, Bovik, Sheikh & Simoncelli 2004) with the paper's Gaussian window."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SIGMA = 1.5
RADIUS = 5
"""The window is cut at 3.5 sigma: 11 pixels across."""
K1, K2 = 0.01, 0.03


def ssim(first: NDArray[Any], second: NDArray[Any], data_range: float) -> NDArray[np.float64]:
    """`(n,)` of frames `(n, h, w)`: the mean of the SSIM map where the window lies wholly inside; float64.

    Raises `ValueError` for frames smaller than the window.
    """
    height, width = first.shape[1:]
    if min(height, width) < 2 * RADIUS + 1:
        raise ValueError(f"frames of {height} x {width} are smaller than the window of {2 * RADIUS + 1}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = (torch.from_numpy(np.ascontiguousarray(a)).to(device).double() for a in (first, second))
    down, along = _windows(height, device), _windows(width, device)

    def smooth(values: torch.Tensor) -> torch.Tensor:
        return down.T @ values @ along

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    result: NDArray[np.float64] = (above / below).mean(dim=(1, 2)).cpu().numpy()
    return result


def _windows(size: int, device: torch.device) -> torch.Tensor:
    """`(size, size - 2 * RADIUS)`: a column is the window at one place, so filtering is a product of matrices."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    windows = np.zeros((size, size - 2 * RADIUS))
    for place in range(size - 2 * RADIUS):
        windows[place : place + len(weights), place] = weights
    return torch.from_numpy(windows).to(device)
