"""A plain `nn.Module` with a torch Dataset of (x, y) pairs: here an encoding model from stimulus features to voxels.

Config:

    remote_eval:
      adapter: plain_module_adapter:EncodingAdapter
      data: {recording: /path/on/the/node}
      user_config: {features: 24, voxels: 200}
"""

# ruff: noqa: ARG002 - the signatures are the protocol's, whether all of it is needed or not

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from remote_payload.reconstruct.protocol import AdapterBase, Kind, Modality, Sample, call_checked


class Recording(Dataset):
    """Stands for your dataset: `features.npy` (T, features) and `bold.npy` (T, voxels), in order of time."""

    def __init__(self, folder: Path, split: str) -> None:
        self.features = np.load(folder / f"{split}_features.npy", mmap_mode="r")
        self.bold = np.load(folder / f"{split}_bold.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int):
        return torch.tensor(self.features[index]), torch.tensor(self.bold[index])


class Pairs:
    """(x, y) pairs as samples. One `group` says that they follow one another in time."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        x, y = self.dataset[index]
        return Sample(id=f"volume-{index:05d}", inputs={"x": x}, targets={"bold": y}, group="run")


class EncodingAdapter(AdapterBase):
    data_names = ("recording",)
    dependence = 5  # neighbouring volumes are autocorrelated

    def build_model(self, config):
        return nn.Linear(config.user["features"], config.user["voxels"])

    def map_state_dict(self, names):
        return {name: name.removeprefix("regression.") for name in names}

    def modalities(self, data, config):
        return [Modality("bold", Kind.VOXELS, "V", (config.user["voxels"],), value_range=None, unit="z")]

    def samples(self, split, data, config):
        # Checked before the call: a wrong argument is told by name, with what the dataset takes.
        return Pairs(call_checked(Recording, folder=Path(data["recording"]), split=split))

    def train_reference(self, data, config):
        return self.samples("train", data, config)

    def predict(self, model, batch):
        return {"bold": model(batch["x"])}
