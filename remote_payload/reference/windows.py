"""The prepared data as the model's inputs and targets."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from remote_payload.reference.data import DemonstrationData
from remote_payload.reference.sizes import CODES_PER_BOOK, WINDOW_FRAMES

CODE_SCALE = float(CODES_PER_BOOK - 1)
"""The network sees and gives codes divided by this; the adapter's modality is in codes again."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """`video` `(N, 10, H, W, 3)` in 0…1, `codes` `(N, 8*K)` over `CODE_SCALE`, `text` `(N, 3*W)`, `fmri` `(N, V)`.

    `has_sound` `(N,)` is False where the film has none: `codes` are then zero and no target.
    """

    video: Tensor
    codes: Tensor
    text: Tensor
    fmri: Tensor
    has_sound: Tensor

    @property
    def target_frame(self) -> Tensor:
        """`(N, H*W*3)`: each window's last frame."""
        return self.video[:, -1].flatten(1)


class Windows:
    """One split, in order. Indexing with a tensor of positions gives a `Batch`."""

    def __init__(self, data: DemonstrationData, split: str) -> None:
        self._frames = torch.tensor(data.array("frames"))
        self._first = torch.tensor(data.array(f"{split}_first")).long()
        codes = torch.tensor(data.array(f"{split}_codes")).flatten(1)
        self._has_sound = codes[:, 0] >= 0
        self._codes = codes.clamp(min=0).float() / CODE_SCALE
        self._text = torch.tensor(data.array(f"{split}_text")).flatten(1)
        self._fmri = torch.tensor(data.array(f"{split}_bold"))
        self._parts = [p for p in data.parts if p.split == split]
        self.sizes = data.sizes

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, positions: Tensor) -> Batch:
        rows = self._first[positions][:, None] + torch.arange(WINDOW_FRAMES)
        return Batch(
            self._frames[rows].float() / 255.0,
            self._codes[positions],
            self._text[positions],
            self._fmri[positions],
            self._has_sound[positions],
        )

    def all(self) -> Batch:
        return self[torch.arange(len(self))]

    def name(self, position: int) -> tuple[str, int]:
        """The film that a window is from and the number of its last frame in that part of the film."""
        first = int(self._first[position])
        for part in self._parts:
            if part.start <= first < part.stop:
                return part.film, first - part.start + WINDOW_FRAMES - 1
        raise IndexError(position)
