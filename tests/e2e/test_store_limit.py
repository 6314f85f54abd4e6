"""The node's store under the profile's limit, as a person meets it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from tests.support.world import World

SIZE = 1_000_000


def write_checkpoint(world: World, name: str) -> str:
    """A safetensors file of a million bytes that no other is like."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    (world.project / name).write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(SIZE))
    return name


def stored(world: World) -> set[Path]:
    """The checkpoints in the store; what else lies there is small."""
    found = (world.node / "root of ours" / "checkpoints").glob("*/file")
    return {path for path in found if path.stat().st_size > SIZE}


def test_the_longest_unused_checkpoint_goes_and_what_a_run_needs_stays(world: World) -> None:
    world.edit_profile(store_limit_gb=0.0025)
    run = ("--jobs", "count", "--checkpoint")
    first, second, third = (
        write_checkpoint(world, name) for name in ("1.safetensors", "2.safetensors", "3.safetensors")
    )
    world.json(*run, first)
    (of_first,) = stored(world)
    world.json(*run, second)
    world.json(*run, first)
    assert len(stored(world)) == 2
    world.json(*run, third)
    assert len(stored(world)) == 2
    assert of_first in stored(world)

    world.edit_profile(store_limit_gb=0.0015)
    waiting = world.json("--jobs", "wait", "--checkpoint", second, "--detach")["run_id"]
    (of_waiting,) = stored(world)
    refused = world.cli(*run, third)
    assert refused.returncode == 5
    assert f"1.0 MB by {waiting}" in refused.stderr
    assert "of at most 1.5 MB" in refused.stderr
    assert "remote-eval gc --cluster lab" in refused.stderr
    assert "would free nothing" in refused.stderr
    said = world.cli("gc", "--cluster", "lab", "--dry-run", "--keep-days", "0")
    assert f"{of_waiting.parent} stays: {waiting} needs it" in said.stdout
    checks = {c["name"]: c["message"] for c in world.json("doctor", "--cluster", "lab", expect=5)}
    assert "of at most 1.5 MB" in checks["store"]
    assert "free on its disk" in checks["store"]
    assert stored(world) == {of_waiting}

    (of_waiting.parent / "go").touch()
    world.json("resume", waiting)
    paused = next(run_id for run_id in world.run_ids() if not (world.run_folder(run_id) / "report.html").exists())
    world.json("resume", paused)
    assert len(stored(world) - {of_waiting}) == 1


def test_a_checkpoint_that_was_freed_is_sent_again_for_a_retry(world: World) -> None:
    write_checkpoint(world, "1.safetensors")
    world.json("--jobs", "fail", "--checkpoint", "1.safetensors", expect=6)
    (failed,) = world.run_ids()
    world.json("gc", "--cluster", "lab", "--keep-gib", "0", "--delete")
    assert stored(world) == set()
    world.json("resume", failed, "--retry", expect=6)
    assert len(stored(world)) == 1
    status = json.loads((world.run_folder(failed) / "diagnostics" / "status.json").read_text())
    assert "this job fails" in json.dumps(status)
