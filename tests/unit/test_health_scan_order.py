"""What is read when: the disk is asked ahead, and small blocks go to a worker together."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.checkpoint.source import Source
from remote_payload.health import ask_ahead
from remote_payload.health.ask_ahead import AskAhead
from remote_payload.health.blocks import iter_blocks, plan_scan
from remote_payload.health.scan import in_batches
from remote_payload.health.worker import BATCH_BLOCKS, BATCH_BYTES

_MIB = 1 << 20


class NotedSource(Source):
    """Says that nothing is cached, and notes what is asked for."""

    def __init__(self, path: str, cached: bool = False) -> None:
        super().__init__(path)
        self.asked: list[tuple[int, int]] = []
        self._cached = cached

    def is_cached(self, offset: int) -> bool:
        return self._cached

    def ask_ahead(self, offset: int, length: int) -> None:
        super().ask_ahead(offset, length)
        self.asked.append((offset, length))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "several.pt"
    torch.save({"state_dict": {f"layer{n}.weight": torch.randn(1024, 1024) for n in range(6)}}, path)
    return str(path)


def _await(ready: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.01)


def test_the_disk_is_asked_for_every_record_in_the_order_of_the_pass(checkpoint: str) -> None:
    header = read_header(checkpoint)
    plan = plan_scan(header)
    expected = [(s.offset, s.length) for b in iter_blocks(header, plan, 16 * _MIB) for s in b.spans if s.length]
    with NotedSource(checkpoint) as source, AskAhead(header, plan, [source]):
        _await(lambda: len(source.asked) == len(expected))
    assert source.asked == expected


def test_it_is_asked_only_so_far_ahead_of_what_was_joined(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_ahead, "ASKED_AHEAD_BYTES", 5 * _MIB)
    header = read_header(checkpoint)
    plan = plan_scan(header)
    with NotedSource(checkpoint) as source, AskAhead(header, plan, [source]) as ahead:
        _await(lambda: sum(n for _, n in source.asked) > 5 * _MIB)
        time.sleep(0.2)
        assert 5 * _MIB < sum(n for _, n in source.asked) <= 9 * _MIB
        ahead.joined(9 * _MIB)
        _await(lambda: sum(n for _, n in source.asked) > 14 * _MIB)
        assert sum(n for _, n in source.asked) > 14 * _MIB


def test_what_is_cached_is_not_asked_for(checkpoint: str) -> None:
    header = read_header(checkpoint)
    with NotedSource(checkpoint, cached=True) as source, AskAhead(header, plan_scan(header), [source]):
        time.sleep(0.2)
    assert source.asked == []


def test_what_was_just_read_is_cached_and_what_is_behind_the_end_is_not(checkpoint: str) -> None:
    with Source(checkpoint) as source:
        source.read(0, 4096)
        assert source.is_cached(0)
        assert not source.is_cached(source.size)


def test_batches_hold_every_block_in_order_and_only_small_ones_together(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    state = {f"bias{n}": torch.zeros(100) for n in range(2 * BATCH_BLOCKS + 3)}
    state["large.weight"] = torch.zeros(2 * _MIB)
    state.update({f"late{n}": torch.zeros(100_000) for n in range(4)})
    torch.save({"state_dict": state}, path)
    header = read_header(str(path))
    blocks = list(iter_blocks(header, plan_scan(header), 64 * _MIB))
    batches = list(in_batches(iter(blocks)))
    assert [b for batch in batches for b in batch] == blocks
    assert max(len(batch) for batch in batches) == BATCH_BLOCKS
    for batch in batches:
        assert len(batch) == 1 or sum(b.length for b in batch) <= BATCH_BYTES
