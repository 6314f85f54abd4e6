"""A first adapter of a kind of data, as text. It runs as it stands but for the model, which only its owner has."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How one kind of modality is declared: what `Modality` gets, and what the data files are called."""

    member: str
    name: str
    layout: str
    shape: str
    value_range: str
    unit: str
    more: str = ""
    dependence: int = 1
    dependence_reason: str = "samples that stand side by side are independent"


KINDS = {
    "image": _Kind("IMAGE", "image", "CHW", "(3, 64, 64)", "(0.0, 1.0)", "intensity"),
    "video": _Kind(
        "VIDEO", "video", "TCHW", "(16, 3, 64, 64)", "(0.0, 1.0)", "intensity", "", 16, "clips that overlap are not"
    ),
    "audio": _Kind("AUDIO_WAVEFORM", "sound", "T", "(16000,)", "(-1.0, 1.0)", "amplitude", "sample_rate_hz=16000"),
    "mel": _Kind("MEL", "mel", "MT", "(80, 200)", "None", "dB"),
    "codes": _Kind("CODES", "codes", "KT", "(8, 112)", "(0.0, 1023.0)", "code"),
    "text": _Kind("TEXT_EMBEDDING", "text", "D", "(768,)", "None", "1"),
    "voxels": _Kind(
        "VOXELS", "fmri", "V", "(20000,)", "None", "z", "", 15, "volumes this near to one another are not independent"
    ),
}

_TEMPLATE = '''"""How remote-eval sees our model: how it is built, what goes in, what its output is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from remote_payload.reconstruct.protocol import AdapterBase, AdapterConfig, Kind, Modality, Sample
from torch import nn


class Samples(Sequence[Sample]):
    """One split: `<split>_inputs.npy` and `<split>_targets.npy`, a sample a row, read when it is asked for."""

    def __init__(self, folder: Path, split: str) -> None:
        self._inputs = np.load(folder / f"{{split}}_inputs.npy", mmap_mode="r")
        self._targets = np.load(folder / f"{{split}}_targets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        inputs = torch.from_numpy(np.array(self._inputs[index]))
        targets = torch.from_numpy(np.array(self._targets[index]))
        return Sample(f"{{index:06d}}", {{"inputs": inputs}}, {{"{name}": targets}})


class {class_name}(AdapterBase):
    data_names = ("{name}",)  # paths on the node that the config names under `data:`
    split = "test"
    dependence = {dependence}  # {dependence_reason}

    def build_model(self, config: AdapterConfig) -> nn.Module:
        # On the meta device: it costs no memory, and the weights go from the file straight to the GPU.
        raise NotImplementedError("return your model here, say MyModel(**config.user)")

    def modalities(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Modality]:
        return (Modality({modality}),)

    def samples(self, split: str, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        return Samples(Path(data["{name}"]), split)

    def train_reference(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        return self.samples("train", data, config)

    def predict(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {{"{name}": model(batch["inputs"])}}
'''


def scaffold(kind: str, class_name: str) -> str:
    """The source of an adapter class. Raises `KeyError` for a kind that is none of `KINDS`, `ValueError` for a name
    that is no identifier."""
    found = KINDS[kind]
    if not class_name.isidentifier():
        raise ValueError(f"{class_name!r} is no name of a class")
    declared = [
        f'"{found.name}"',
        f"Kind.{found.member}",
        f'"{found.layout}"',
        found.shape,
        found.value_range,
        f'"{found.unit}"',
        *([found.more] if found.more else []),
    ]
    return _TEMPLATE.format(
        class_name=class_name,
        name=found.name,
        modality=", ".join(declared),
        dependence=found.dependence,
        dependence_reason=found.dependence_reason,
    )
