"""Checkpoints of the reference model that are wrong in one way each, made from a good one as training would make them.

The rows of the last video layer are the frame's elements: a model that was trained on frames with their channels or
axes in another order has the same rows in that order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_payload.reference.data import DemonstrationData
from remote_payload.reference.model import FilmAutoencoder
from remote_payload.reference.sizes import ReferenceSizes
from remote_payload.reference.windows import Windows

_HEAD = ("decoder.layer13_video.0.weight", "decoder.layer13_video.0.bias")


def with_swapped_channels(good: dict[str, Any]) -> dict[str, Any]:
    """Trained on frames in blue, green, red."""
    return _with_frames(good, lambda rows: rows.flip(2))


def with_channels_first(good: dict[str, Any]) -> dict[str, Any]:
    """Trained on frames laid out channel, height, width."""
    return _with_frames(good, lambda rows: rows.movedim(2, 0).contiguous())


def with_collapsed_bottleneck(good: dict[str, Any]) -> dict[str, Any]:
    """Whose bottleneck's scales and shifts went to 0: whatever comes in, the same comes out."""
    found = copy.deepcopy(good)
    for leaf in ("weight", "bias"):
        found["model_state_dict"][f"encoder.layer7_bottleneck.1.{leaf}"].zero_()
    return found


def with_another_range(good: dict[str, Any], film: Path, steps: int = 600) -> dict[str, Any]:
    """Whose video head was trained on frames that were divided by 255 once more than they should be."""
    found = copy.deepcopy(good)
    sizes = ReferenceSizes.at_scale(good["config"]["scale"])
    model = FilmAutoencoder(sizes)
    model.load_state_dict(found["model_state_dict"])
    model.eval()
    windows = Windows(DemonstrationData.open(film), "train")
    # Twice as many as the head has inputs: as many would let it fit them all, and go anywhere on others.
    batch = windows[torch.arange(0, len(windows), 2)]
    frames = batch.video[:, -1].flatten(1) / 255.0
    kept: list[torch.Tensor] = []
    head = model.decoder.layer13_video
    head.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    with torch.no_grad():
        model(batch.video.flatten(1), batch.codes, batch.text)
        # Where such a head would begin: at the mean of what it is trained on.
        nn.init.normal_(head[0].weight, std=1e-3)
        head[0].bias.copy_(torch.logit(frames.mean(dim=0).clamp(1e-5, 1 - 1e-5)))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (255.0 * (head(kept[0]) - frames)).square().mean()
        loss.backward()
        optimizer.step()
    found["model_state_dict"] = model.state_dict()
    return found


def _with_frames(good: dict[str, Any], arrange: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    found = copy.deepcopy(good)
    sizes = ReferenceSizes.at_scale(good["config"]["scale"])
    rows = torch.arange(sizes.frame_elements).view(sizes.frame_height, sizes.frame_width, 3)
    order = arrange(rows).flatten()
    for name in _HEAD:
        found["model_state_dict"][name] = found["model_state_dict"][name][order].clone()
    return found
