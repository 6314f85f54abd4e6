"""What of a checkpoint is sent when, over a real sshd."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import torch

from orchestrator.inspection import inspect_local
from orchestrator.transfer.order import ChunkClass, classify, tensor_bytes
from remote_payload.wire.chunks import digest_file
from remote_payload.wire.layout import NodeLayout
from tests.support.world import World, until


def trained(width: int = 256) -> dict[str, Any]:
    """Weights, and twice as much of an optimizer that stands in front of them in the file."""
    torch.manual_seed(2)
    names = ("0.weight", "2.weight", "4.weight")
    return {
        "optimizer": {
            "state": {n: {"exp_avg": torch.randn(width, width), "exp_avg_sq": torch.rand(width, width)} for n in names},
            "param_groups": [{"params": list(names), "lr": 1e-3}],
        },
        "model": {name: torch.randn(width, width) for name in names},
    }


def chunk_classes(path: Path) -> tuple[str, list[ChunkClass]]:
    data = path.read_bytes()
    manifest = digest_file(io.BytesIO(data), len(data))
    return manifest.digest, classify(manifest, tensor_bytes(inspect_local(path)["header"]))


def test_an_upload_that_is_killed_has_brought_header_and_weights_before_anything_else(world: World) -> None:
    path = world.project / "trained.pt"
    torch.save(trained(), path)
    digest, classes = chunk_classes(path)
    world.edit_profile(bandwidth_limit_mbps=2.4, pack_floats=False)
    layout = NodeLayout(str(world.node / "root of ours"))
    journal = Path(layout.checkpoint_journal(digest))
    client = world.start("--checkpoint", path.name, "--jobs", "count")
    until(lambda: journal.exists() and journal.read_bytes().endswith(b".\n"))
    client.send_signal(signal.SIGKILL)
    client.communicate(timeout=60)
    here = {int(line.split()[0]) for line in journal.read_text().splitlines()[1:] if line}
    order = sorted(range(len(classes)), key=lambda index: (classes[index], index))
    assert here == set(order[: len(here)])
    assert classes[order[0]] is ChunkClass.HEADER
    assert order != sorted(order)
