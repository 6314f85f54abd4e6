"""The reference architecture: a film (video, audio codes, text) to fMRI and back, at any scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remote_payload.reference.sizes import ReferenceSizes


class FilmAutoencoder(nn.Module):
    """Video, audio and text in; their reconstructions, the predicted volume and the bottleneck out.

    Inputs are flat, one row a sample: video `(N, 10*H*W*3)` in time, height, width, channel order; audio
    `(N, 8*code_frames)`; text `(N, 3*text_width)`. Widths follow `ReferenceSizes` (its docstring has the scaling rule);
    at scale 1 there are 3,500,188,290 parameters in 162 state-dict entries.
    """

    def __init__(self, sizes: ReferenceSizes, dropout: float = 0.1) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes, dropout)
        self.decoder = Decoder(sizes, dropout)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> dict[str, Tensor]:
        bottleneck, predicted_fmri = self.encoder(video, audio, text)
        reconstructions: dict[str, Tensor] = self.decoder(bottleneck)
        return {**reconstructions, "predicted_fmri": predicted_fmri, "bottleneck": bottleneck}


class Encoder(nn.Module):
    """The three encoders, the trunk down to the bottleneck, and the bottleneck's voxels. Torch's default init."""

    def __init__(self, sizes: ReferenceSizes, dropout: float) -> None:
        super().__init__()
        self.video_encoder = StreamEncoder(sizes.video_in, sizes.video_hidden, dropout)
        self.audio_encoder = StreamEncoder(sizes.audio_in, sizes.audio_hidden, dropout)
        self.text_encoder = StreamEncoder(sizes.text_in, sizes.text_hidden, dropout)
        first, second, third, bottleneck = sizes.trunk
        self.feature_conv = _block(sizes.fused, first, dropout)
        self.layer5 = _block(first, second, dropout)
        self.layer6 = _block(second, third, dropout)
        self.layer7_bottleneck = nn.Sequential(nn.Linear(third, bottleneck), nn.BatchNorm1d(bottleneck))
        self.bottleneck_to_voxels = nn.Sequential(
            *_block(bottleneck, sizes.voxel_hidden, dropout), nn.Linear(sizes.voxel_hidden, sizes.voxels)
        )

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        fused = torch.cat([self.video_encoder(video), self.audio_encoder(audio), self.text_encoder(text)], dim=1)
        bottleneck = self.layer7_bottleneck(self.layer6(self.layer5(self.feature_conv(fused))))
        return bottleneck, self.bottleneck_to_voxels(bottleneck)


class StreamEncoder(nn.Module):
    """fc1, bn1, ReLU, dropout, and so on through the given widths."""

    def __init__(self, width_in: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.depth = len(widths)
        self.dropout = nn.Dropout(dropout)
        for number, width in enumerate(widths, start=1):
            self.add_module(f"fc{number}", nn.Linear(width_in, width))
            self.add_module(f"bn{number}", nn.BatchNorm1d(width))
            width_in = width

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, self.depth + 1):
            linear, norm = self.get_submodule(f"fc{number}"), self.get_submodule(f"bn{number}")
            x = self.dropout(torch.relu(norm(linear(x))))
        return x


class Decoder(nn.Module):
    """From the bottleneck back to one frame (sigmoid), the codes and the text. Kaiming normal (fan_out), biases 0."""

    def __init__(self, sizes: ReferenceSizes, dropout: float) -> None:
        super().__init__()
        eighth, ninth, tenth, eleventh = sizes.decoder
        self.layer8 = _block(sizes.trunk[-1], eighth, dropout)
        self.layer9 = _block(eighth, ninth, dropout)
        self.layer10 = _block(ninth, tenth, dropout)
        self.layer11 = _block(tenth, eleventh, dropout)
        self.layer12_video = _head_body(eleventh, sizes.video_head, dropout)
        self.layer12_audio = _head_body(eleventh, sizes.audio_head, dropout)
        self.layer12_text = _head_body(eleventh, sizes.text_head, dropout)
        self.layer13_video = nn.Sequential(nn.Linear(sizes.video_head[-1], sizes.frame_elements), nn.Sigmoid())
        self.layer13_audio = nn.Linear(sizes.audio_head[-1], sizes.audio_in)
        self.layer13_text = nn.Linear(sizes.text_head[-1], sizes.text_in)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, bottleneck: Tensor) -> dict[str, Tensor]:
        shared = self.layer11(self.layer10(self.layer9(self.layer8(bottleneck))))
        return {
            "video_recon": self.layer13_video(self.layer12_video(shared)),
            "audio_recon": self.layer13_audio(self.layer12_audio(shared)),
            "text_recon": self.layer13_text(self.layer12_text(shared)),
        }


def _block(width_in: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))


def _head_body(width_in: int, widths: tuple[int, int], dropout: float) -> nn.Sequential:
    first, second = widths
    return nn.Sequential(*_block(width_in, first, dropout), nn.Linear(first, second), nn.BatchNorm1d(second), nn.ReLU())
