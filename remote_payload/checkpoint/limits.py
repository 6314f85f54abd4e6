"""Bounds that keep a hostile file from costing more than a few seconds and a few hundred megabytes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """What reading a pickle took: its bytes, its opcodes, and the estimated size of the objects that it made."""

    pickle_bytes: int = 0
    opcodes: int = 0
    memory_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the header reader will take at most. Real checkpoints of 100,000 tensors stay well inside."""

    pickle_bytes: int = 256 * 1024 * 1024
    opcodes: int = 12_000_000
    mark_depth: int = 100_000
    memory_bytes: int = 512 * 1024 * 1024
    """Estimated size of the objects that a pickle makes, the pickle itself not counted."""
    records: int = 500_000
    directory_bytes: int = 128 * 1024 * 1024
    tensors: int = 300_000
    name_characters: int = 64 * 1024 * 1024
    """All tensor names together: composed names can be far larger than the pickle that spells their parts."""
    safetensors_header_bytes: int = 64 * 1024 * 1024
    shards: int = 500
    """All are open at once, under the usual limit of 1024 files a process."""
    shown_values: int = 50_000
    """Plain values (config, histories, scalars) that a header repeats."""
    shown_text: int = 2000
    """Characters of one such value."""
    shown_depth: int = 24
    single_values: int = 20_000
    """One-element tensors (counters, optimizer steps) whose value is read with the header."""

    def after(self, cost: Cost) -> Limits:
        """What is left for the next file of a checkpoint that has several: all of them share one budget."""
        return dataclasses.replace(
            self,
            pickle_bytes=max(0, self.pickle_bytes - cost.pickle_bytes),
            opcodes=max(0, self.opcodes - cost.opcodes),
            memory_bytes=max(0, self.memory_bytes - cost.memory_bytes),
        )


DEFAULT_LIMITS = Limits()
