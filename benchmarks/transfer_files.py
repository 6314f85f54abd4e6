"""Files to send: random bytes, and checkpoints whose numbers look like those of a trained network."""

from __future__ import annotations

import os
from pathlib import Path

_PIECE = 16 * 1024 * 1024
LAYER_ELEMENTS = 4 * 1024 * 1024
_DRAWN = 64


def write_random(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        while size:
            piece = min(size, _PIECE)
            file.write(os.urandom(piece))
            size -= piece
    return path


def write_checkpoint(path: Path, size: int, dtype: str, *, adam: bool = False, seed: int = 0) -> Path:
    """As `torch.save` writes it: layers of 4 Mi elements of `dtype`, normal with a spread of 0.02; with `adam`, as much
    again for either moment, so that the weights are a third. Beyond `_DRAWN` layers they are earlier ones, scaled: no
    two are alike, and it takes a tenth of the time."""
    import torch

    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    layers = max(1, size // (LAYER_ELEMENTS * kind.itemsize * (3 if adam else 1)))
    drawn = [_normal(0.02) for _ in range(min(layers, _DRAWN))]
    weights = {
        f"layer.{n}.weight": (drawn[n % _DRAWN] * (1.0 + n / layers)).to(kind).reshape(2048, -1) for n in range(layers)
    }
    document: dict[str, object] = {"model_state_dict": weights, "epoch": 3}
    if adam:
        state = {
            n: {"exp_avg": _normal(1e-4).to(kind), "exp_avg_sq": _normal(1e-4).square().to(kind)} for n in range(layers)
        }
        document["optimizer_state_dict"] = {"state": state, "param_groups": []}
    torch.save(document, path)
    return path


def change_one_layer(source: Path, target: Path) -> int:
    """Write `target`, as `source` with new numbers in its first layer; how many bytes changed."""
    import torch

    document = torch.load(source, map_location="cpu", weights_only=True)
    weights = document["model_state_dict"]
    name = next(iter(weights))
    weights[name] = (_normal(0.02).to(weights[name].dtype)).reshape(weights[name].shape)
    torch.save(document, target)
    return int(weights[name].numel() * weights[name].element_size())


def _normal(spread: float):  # type: ignore[no-untyped-def]  # torch is imported only where it is needed
    import torch

    return torch.randn(LAYER_ELEMENTS) * spread
