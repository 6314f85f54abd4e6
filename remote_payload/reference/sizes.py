"""The reference model's widths at any scale. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any

WINDOW_FRAMES = 10
CODEBOOKS = 8
CODES_PER_BOOK = 1024
TEXT_SEGMENTS = 3
_CHANNELS = 3
_NARROWEST = 4


@dataclasses.dataclass(frozen=True)
class ReferenceSizes:
    """Every width of the reference architecture, in elements.

    Scale 1 is the laboratory's model. At scale `s` each hidden width and the text embedding are divided by `s` (none
    falls below 4), while each side of what was measured, that is a frame's height and width, the voxel grid's three
    sides and the audio codes' time axis, is divided by the cube root of `s`: so voxels fall with `s`, pixels fall more
    slowly, and pictures stay readable. The numbers of frames, codebooks and text segments stay.
    """

    scale: int
    frame_height: int
    frame_width: int
    code_frames: int
    text_width: int
    voxels: int
    video_hidden: tuple[int, int, int]
    audio_hidden: tuple[int, int]
    text_hidden: tuple[int, int]
    trunk: tuple[int, int, int, int]
    voxel_hidden: int
    decoder: tuple[int, int, int, int]
    video_head: tuple[int, int]
    audio_head: tuple[int, int]
    text_head: tuple[int, int]

    @classmethod
    def at_scale(cls, scale: int = 1) -> ReferenceSizes:
        """The widths at `scale` >= 1; `ValueError` for anything else."""
        if not 1 <= scale <= 1024:
            raise ValueError(f"scale {scale} is not between 1 and 1024")
        side = scale ** (1 / 3)

        def hidden(width: int) -> int:
            return max(_NARROWEST, width // scale)

        return cls(
            scale=scale,
            frame_height=round(90 / side),
            frame_width=round(160 / side),
            code_frames=round(112 / side),
            text_width=hidden(1024),
            voxels=83138 // scale,
            video_hidden=(hidden(4096), hidden(2048), hidden(1024)),
            audio_hidden=(hidden(512), hidden(256)),
            text_hidden=(hidden(512), hidden(256)),
            trunk=(hidden(1536), hidden(4096), hidden(8000), hidden(2048)),
            voxel_hidden=hidden(16384),
            decoder=(hidden(8000), hidden(4096), hidden(2048), hidden(1536)),
            video_head=(hidden(2048), hidden(4096)),
            audio_head=(hidden(2048), hidden(2048)),
            text_head=(hidden(1024), hidden(1024)),
        )

    @property
    def frame_elements(self) -> int:
        return self.frame_height * self.frame_width * _CHANNELS

    @property
    def video_in(self) -> int:
        return WINDOW_FRAMES * self.frame_elements

    @property
    def audio_in(self) -> int:
        return CODEBOOKS * self.code_frames

    @property
    def text_in(self) -> int:
        return TEXT_SEGMENTS * self.text_width

    @property
    def fused(self) -> int:
        """Width of the three encoders' outputs side by side."""
        return self.video_hidden[-1] + self.audio_hidden[-1] + self.text_hidden[-1]

    def facts(self) -> dict[str, Any]:
        """What `info` prints: the widths as plain JSON values."""
        return {
            **dataclasses.asdict(self),
            "video_in": self.video_in,
            "audio_in": self.audio_in,
            "text_in": self.text_in,
            "video_out": self.frame_elements,
        }
