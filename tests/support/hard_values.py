"""A checkpoint of every value that statistics may trip over, and the comparison of two results number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SHAPES = ((300, 1031), (3, 70000), (5000, 33), (1, 7), (2048, 1))


def hard_checkpoint(shapes: Sequence[tuple[int, int]] = SHAPES) -> dict[str, Any]:
    """Every type with NaN, infinities, denormals, constants, dead rows and columns, odd sizes, Adam's moments."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Any] = {}
    moments: dict[int, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for rows, columns in shapes:
            weight = torch.randn(rows, columns, generator=generator) * 0.02
            weight[::7, ::3] *= 1e-6
            if rows > 100 and columns > 10:
                weight[5], weight[9], weight[11], weight[rows - 1] = 0, 0.25, weight[3], weight[3]
                weight[:, 4] = 0
                weight[20, 3], weight[21, 2], weight[22, 1] = float("nan"), float("inf"), -float("inf")
                weight[24, 5:11], weight[25, 5:8] = float("nan"), float("inf")
                weight[26, 1:4], weight[27, 2], weight[28, 6] = -0.0, 1e-41, torch.finfo(torch.float32).max
                weight[30:40, 5] = 1.0
            state[f"block.{str(dtype)[6:]}_{rows}.weight"] = weight.to(dtype)
            first = torch.randn(rows, columns, generator=generator) * 1e-4
            second = torch.randn(rows, columns, generator=generator).abs() * 1e-7
            second[:, 0], second[-1, -1] = 0, -1.0
            kind = torch.float32 if rows == 3 else dtype
            moments[len(moments)] = {
                "step": torch.tensor(200.0),
                "exp_avg": first.to(kind),
                "exp_avg_sq": second.to(kind),
            }
    state["block.norm.weight"] = torch.ones(513, dtype=torch.bfloat16)
    state["block.norm.num_batches_tracked"] = torch.tensor(7)
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(moments)}
    return {"model_state_dict": state, "optimizer_state_dict": {"state": moments, "param_groups": [group]}}


def flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{at}/{name}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for n, item in enumerate(value) for k, v in flat(item, f"{at}/{n}").items()}
    return {at: value}


def differing(first: Any, second: Any, rel_tol: float) -> list[tuple[str, Any, Any]]:
    """Path and both values of what differs; floats are equal within `rel_tol`."""
    left, right = flat(first), flat(second)
    keys = sorted(left.keys() | right.keys())
    return [(k, left.get(k), right.get(k)) for k in keys if not _same(left.get(k), right.get(k), rel_tol)]


def _same(a: Any, b: Any, rel_tol: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or math.isclose(a, b, rel_tol=rel_tol, abs_tol=1e-300)
    return bool(a == b)
