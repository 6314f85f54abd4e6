"""Bytes of weights as a model has them: normally distributed, so that their exponents pack."""

from __future__ import annotations

import numpy as np


def float32(count: int) -> bytes:
    return np.random.default_rng(count).normal(0, 0.02, count).astype("<f4").tobytes()


def bfloat16(count: int) -> bytes:
    whole = float32(count)
    halves = bytearray(2 * count)
    halves[::2], halves[1::2] = whole[2::4], whole[3::4]
    return bytes(halves)
