"""A folder is hashed while the node still imports torch, and its first files go while the others are hashed."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli.output import ConsoleReporter
from orchestrator.layout import LocalLayout
from orchestrator.node import BULK_BYTES, Node
from orchestrator.pipeline import folders
from orchestrator.pipeline.context import Services
from orchestrator.pipeline.resolve import Request, resolve
from orchestrator.pipeline.run import advance
from orchestrator.pipeline.send import ask_known
from orchestrator.pipeline.world import make_services
from orchestrator.transfer import fingerprints
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.messages import KnownChunks
from remote_payload.wire.run_messages import Preflight
from tests.support.world import World, digests, until

SHARDS = ("model-1.pt", "model-2.pt", "optimizer.pt")


class Shards:
    """A folder of three files here, and what of them is read when."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.folder = world.project / "step 5"
        self.folder.mkdir()
        for number, name in enumerate(SHARDS):
            values = torch.randn(BULK_BYTES // 8, generator=torch.Generator().manual_seed(number))
            torch.save({f"w{number}": values}, self.folder / name)
        names = {f"w{number}": name for number, name in enumerate(SHARDS)}
        index = {"metadata": {}, "weight_map": names}
        (self.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        self.layout = NodeLayout(str(world.node / "root of ours"))
        self.bytes_read = dict.fromkeys(SHARDS, 0)
        inodes = {(self.folder / name).stat().st_ino: name for name in SHARDS}
        read_at = fingerprints._read_at

        def count(fd: int, view: memoryview, offset: int) -> int:
            name = inodes.get(os.fstat(fd).st_ino, "")
            if name:
                self.before_read(name)
            count = read_at(fd, view, offset)
            if name:
                self.bytes_read[name] += count
            return count

        monkeypatch.setattr(fingerprints, "_read_at", count)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def before_read(self, name: str) -> None:
        """For a test to wait in."""

    def stored(self) -> list[int]:
        """Sizes of the large files that are whole in the node's store."""
        sizes = (path.stat().st_size for path in Path(self.layout.checkpoints).glob("*/file"))
        return sorted(size for size in sizes if size >= BULK_BYTES // 4)

    def run(self) -> Any:
        layout = LocalLayout(self.world.home / "data", self.world.home / "config", self.world.home / "cache")
        services: Services = make_services(layout, ConsoleReporter(quiet=True), lambda *_: None)
        request = Request("lab", str(self.folder), jobs=["count"], start_folder=self.world.project)
        plan = resolve(request, services)
        assert advance(plan, services) is not None
        provenance = json.loads((self.world.run_folder(plan.run_id) / "provenance.json").read_text())
        assert digests(Path(provenance["checkpoint"]["path"])) == digests(self.folder)
        return provenance


@pytest.fixture
def shards(world: World, monkeypatch: pytest.MonkeyPatch) -> Shards:
    world.edit_profile(pack_floats=False)
    return Shards(world, monkeypatch)


def test_a_folder_is_hashed_before_preflight_has_ended(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Node.call

    def call_late(node: Node, verb: str, request: Any, result: Any, **options: Any) -> Any:
        if result is Preflight:
            until(lambda: sum(shards.bytes_read.values()) >= 3 * BULK_BYTES // 2)
        return call(node, verb, request, result, **options)

    monkeypatch.setattr(Node, "call", call_late)
    assert shards.run()["bytes_sent"] == shards.size


def test_a_file_of_a_folder_goes_while_the_next_is_hashed(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def until_the_first_has_gone(name: str) -> None:
        if name == SHARDS[-1] and not seen:
            seen.append([])
            until(lambda: len(shards.stored()) == 2)
            seen[0] = shards.stored()

    monkeypatch.setattr(shards, "before_read", until_the_first_has_gone)
    monkeypatch.setattr(fingerprints, "_MAX_THREADS", 1)
    assert shards.run()["bytes_sent"] == shards.size
    assert seen == [sorted((shards.folder / name).stat().st_size for name in SHARDS[:2])]


def test_of_a_folder_that_the_node_has_no_file_goes_while_the_next_is_hashed(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.run()
    for name in SHARDS:
        os.utime(shards.folder / name, (1, 1))  # not remembered, so that it is hashed again
    asked = threading.Event()

    def ask(*arguments: Any) -> KnownChunks:
        asked.set()
        return ask_known(*arguments)

    def until_the_node_was_asked(name: str) -> None:
        if name == SHARDS[-1]:
            assert asked.wait(60)

    monkeypatch.setattr(folders, "ask_known", ask)
    monkeypatch.setattr(folders, "send_to_node", lambda *_, **__: pytest.fail("a file was sent"))
    monkeypatch.setattr(shards, "before_read", until_the_node_was_asked)
    assert shards.run()["bytes_sent"] == 0
