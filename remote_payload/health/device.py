"""Which device reduces the blocks. Needs torch."""

from __future__ import annotations

import torch


def choose_device(wanted: str) -> str:
    """`cuda` where it is wanted or, for `auto`, works; else `cpu`. Raises `RuntimeError` for CUDA that fails."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    try:
        torch.empty(1, device="cuda")
    except RuntimeError:
        # A GPU that others have filled is no reason to leave the file unexamined: the CPU gives the same numbers.
        if wanted == "auto":
            return "cpu"
        raise
    return "cuda"
