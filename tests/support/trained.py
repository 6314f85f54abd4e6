"""Checkpoints of a trained model with its optimizer, and what their chunks hold."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from orchestrator.inspection import inspect_local
from orchestrator.transfer.order import ChunkClass, classify, tensor_bytes
from remote_payload.wire.chunks import ChunkManifest, digest_file
from tests.support.image_project import SIDE, autoencoder


def write_trained(path: Path, width: int) -> None:
    """The example's model after a step of Adam; in the file the optimizer stands in front of the weights."""
    torch.manual_seed(2)
    model = autoencoder(width)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, SIDE, SIDE)).pow(2).mean().backward()
    optimizer.step()
    torch.save({"optimizer_state_dict": optimizer.state_dict(), "model_state_dict": model.state_dict()}, path)


def chunks_of(path: Path) -> tuple[ChunkManifest, list[ChunkClass]]:
    data = path.read_bytes()
    manifest, inspected = digest_file(io.BytesIO(data), len(data)), inspect_local(path)
    return manifest, classify(manifest.spans, tensor_bytes(inspected["header"], inspected["reads"]))
