"""A project that ships the example adapter for images, with its data on the node."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from torch import nn

from tests.support.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"
SIDE = 16


def autoencoder(width: int) -> nn.Module:
    """The example's model."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from image_autoencoder_adapter import Autoencoder  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    model: nn.Module = Autoencoder(width)
    return model


def ship_image_adapter(world: World) -> None:
    """The adapter among the project's code, images on the node, and the project file that names both."""
    world.with_torch()
    code = world.project / "evaluation"
    code.mkdir()
    shutil.copy(EXAMPLES / "image_autoencoder_adapter.py", code / "adapter.py")
    images = world.node / "data" / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 9)):
        np.save(images / f"{split}.npy", generator.integers(0, 255, (count, 3, SIDE, SIDE), dtype=np.uint8))
    project = world.project / "remote-eval.yaml"
    values = yaml.safe_load(project.read_text())
    values |= {"adapter": "evaluation.adapter:ImageAutoencoderAdapter", "code": ["my_jobs", "evaluation"]}
    project.write_text(yaml.safe_dump(values))
    subprocess.run(["git", "add", "evaluation"], cwd=world.project, check=True, timeout=30)


def write_config(world: World, width: int) -> None:
    section = {"data": {"images": "${DATA}/images"}, "user_config": {"width": width, "side": SIDE}}
    (world.project / "eval.yaml").write_text(yaml.safe_dump({"remote_eval": section}))
    world.edit_profile(variables={"DATA": str(world.node / "data")})
