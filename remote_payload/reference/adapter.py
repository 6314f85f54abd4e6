"""The reference model's adapter: what the demonstration evaluates, and an example of a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remote_payload.reconstruct.protocol import (
    AdapterBase,
    AdapterConfig,
    AdapterError,
    Kind,
    Modality,
    Role,
    Sample,
    VoxelPlaces,
)
from remote_payload.reference import data as demonstration
from remote_payload.reference.model import FilmAutoencoder
from remote_payload.reference.sizes import CODEBOOKS, TEXT_SEGMENTS, WINDOW_FRAMES, ReferenceSizes
from remote_payload.reference.windows import CODE_SCALE, Windows


class FilmSamples(Sequence[Sample]):
    """One split of the demonstration data, read when a sample is asked for."""

    def __init__(self, data: demonstration.DemonstrationData, split: str) -> None:
        self._windows = Windows(data, split)
        self._sizes = data.sizes

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        one = self._windows[torch.tensor([position])]
        film, frame = self._windows.name(position)
        sizes = self._sizes
        targets = {
            "video": one.video[0, -1],
            "text": one.text[0].view(TEXT_SEGMENTS, sizes.text_width),
            "fmri": one.fmri[0],
        }
        if bool(one.has_sound[0]):
            targets["audio"] = torch.round(one.codes[0] * CODE_SCALE).view(CODEBOOKS, sizes.code_frames)
        inputs = {"video": one.video[0].flatten(), "audio": one.codes[0], "text": one.text[0]}
        return Sample(f"{film}:{frame:04d}", inputs, targets, group=film)


class ReferenceAdapter(AdapterBase):
    """The film autoencoder on the demonstration data, at the scale that the user's or the checkpoint's config names."""

    data_names = ("film",)
    dependence = WINDOW_FRAMES

    def build_model(self, config: AdapterConfig) -> nn.Module:
        return FilmAutoencoder(self._sizes(config))

    def modalities(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Modality]:
        opened, sizes = self._open(data, config), self._sizes(config)
        grid = opened.manifest["grid"]["shape"]
        places = VoxelPlaces((grid[0], grid[1], grid[2]), opened.array("voxels"))
        frame = (sizes.frame_height, sizes.frame_width, 3)
        codes = (CODEBOOKS, sizes.code_frames)
        text = (TEXT_SEGMENTS, sizes.text_width)
        return (
            Modality("video", Kind.VIDEO, "HWC", frame, (0.0, 1.0), "intensity", label=demonstration.VIDEO_LABEL),
            Modality(
                "fmri", Kind.VOXELS, "V", (sizes.voxels,), None, "z", label=demonstration.BOLD_LABEL, places=places
            ),
            Modality(
                "audio",
                Kind.CODES,
                "KT",
                codes,
                (0.0, CODE_SCALE),
                "code",
                Role.AUXILIARY,
                label=demonstration.CODES_LABEL,
            ),
            Modality(
                "text",
                Kind.TEXT_EMBEDDING,
                "SD",
                text,
                (-1.0, 1.0),
                "1",
                Role.AUXILIARY,
                label=demonstration.TEXT_LABEL,
            ),
        )

    def samples(self, split: str, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        return FilmSamples(self._open(data, config), split)

    def train_reference(self, data: Mapping[str, str], config: AdapterConfig) -> Sequence[Sample]:
        return self.samples("train", data, config)

    def predict(self, model: FilmAutoencoder, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes = model.sizes
        out = model(batch["video"], batch["audio"], batch["text"])
        return {
            "video": out["video_recon"].view(-1, sizes.frame_height, sizes.frame_width, 3),
            "fmri": out["predicted_fmri"],
            "audio": (out["audio_recon"].float() * CODE_SCALE)
            .clamp(0, CODE_SCALE)
            .view(-1, CODEBOOKS, sizes.code_frames),
            "text": out["text_recon"].view(-1, TEXT_SEGMENTS, sizes.text_width),
        }

    def _open(self, data: Mapping[str, str], config: AdapterConfig) -> demonstration.DemonstrationData:
        opened = demonstration.DemonstrationData.open(Path(data["film"]))
        wanted = self._sizes(config).scale
        if opened.sizes.scale != wanted:
            raise AdapterError(f"the model is at scale {wanted}, the data in {data['film']} at {opened.sizes.scale}")
        return opened

    def _sizes(self, config: AdapterConfig) -> ReferenceSizes:
        scale: Any = config.user.get("scale", config.checkpoint.get("scale", 1))
        if isinstance(scale, bool) or not isinstance(scale, int):
            raise AdapterError(f"the scale {scale!r} is no whole number")
        return ReferenceSizes.at_scale(scale)
