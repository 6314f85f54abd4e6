"""Adapters for several processes: they are imported by name in each of them, and told by environment what to do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_payload.reconstruct.protocol import AdapterBase, AdapterConfig, Kind, Modality, Sample

COUNT = 23
SIDE = 8
LOG = "SHARDED_ADAPTER_LOG"
"""Names a file that gets a line `<pid> <batch size> <first sample>` for every batch that goes through the model."""
AT = "SHARDED_ADAPTER_AT"
"""`kill:N`, `raise:N`, `hang:N`: what to do when sample N is in a batch. `scarce:N`: no more than two samples at once
where sample N is among them.
`meet:N`: wait until N processes have a batch."""


def _processes() -> set[str]:
    return {line.split()[0] for line in Path(os.environ[LOG]).read_text().splitlines()}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(SIDE * SIDE, SIDE * SIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.middle(x.flatten(1))).view(-1, SIDE, SIDE)


class Sharded(AdapterBase):
    def build_model(self, config: AdapterConfig) -> nn.Module:
        return Small()

    def modalities(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Modality]:
        return (Modality("image", Kind.IMAGE, "HW", (SIDE, SIDE), (0.0, 1.0), "intensity"),)

    def samples(self, split: str, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        generator = torch.Generator().manual_seed(7)
        images = torch.rand(COUNT, SIDE, SIDE, generator=generator)
        return [
            Sample(f"s{n:02d}", {"image": image, "number": torch.tensor(n)}, {"image": image} if n != 4 else {})
            for n, image in enumerate(images)
        ]

    def predict(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        numbers = batch["number"].tolist()
        if LOG in os.environ:
            with Path(os.environ[LOG]).open("a") as file:
                file.write(f"{os.getpid()} {len(numbers)} {numbers[0]}\n")
        what, _, number = os.environ.get(AT, "").partition(":")
        if what == "meet":
            deadline = time.monotonic() + 120
            while len(_processes()) < int(number) and time.monotonic() < deadline:
                time.sleep(0.02)
        if what == "scarce" and len(numbers) > 2 and int(number) in numbers:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if what in ("kill", "raise", "hang") and int(number) in numbers:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hang":
                time.sleep(600)
            raise ValueError("the adapter's own mistake")
        # As a model that samples does.
        return {"image": model(batch["image"]) + 0.01 * torch.randn(batch["image"].shape)}

    def latents(self, model: Any, batch: Any, predicted: Any) -> Any:
        return {"image": (batch["image"].flatten(1), predicted["image"].flatten(1))}
