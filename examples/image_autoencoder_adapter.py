"""Any image autoencoder in twenty lines: images as `DATA/test.npy` and `DATA/train.npy`, uint8 (n, 3, height, width).

Config:

    remote_eval:
      adapter: image_autoencoder_adapter:ImageAutoencoderAdapter
      data: {images: /path/on/the/node}
      user_config: {width: 16, side: 32}
"""

# ruff: noqa: ARG002 - the signatures are the protocol's, whether all of it is needed or not

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from remote_payload.reconstruct.protocol import AdapterBase, Kind, Modality, Sample


class Autoencoder(nn.Module):
    """Stands for your model: import yours instead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, images):
        return self.decoder(self.encoder(images))


class Images:
    """Sized and indexable: that is all that is asked of samples."""

    def __init__(self, path: Path) -> None:
        self.images = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = torch.tensor(self.images[index]).float() / 255
        return Sample(id=f"image-{index:05d}", inputs={"image": image}, targets={"image": image})


class ImageAutoencoderAdapter(AdapterBase):
    data_names = ("images",)

    def build_model(self, config):
        return Autoencoder(config.user.get("width", 16))

    def modalities(self, data, config):
        side = config.user.get("side", 32)
        return [Modality("image", Kind.IMAGE, "CHW", (3, side, side), value_range=(0.0, 1.0), unit="intensity")]

    def samples(self, split, data, config):
        return Images(Path(data["images"]) / f"{split}.npy")

    def train_reference(self, data, config):
        return self.samples("train", data, config)

    def predict(self, model, batch):
        return {"image": model(batch["image"])}
