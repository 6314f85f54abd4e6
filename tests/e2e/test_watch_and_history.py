"""The nightly watch and the history, over real runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.world import World, until


def write_targets(world: World, *targets: dict[str, object]) -> None:
    path = world.project / "nightly.yaml"
    path.write_text(yaml.safe_dump({"targets": list(targets)}))


def test_a_tick_evaluates_what_is_new_and_nothing_else(world: World) -> None:
    write_targets(world, {"name": "best", "checkpoint": "best.pt", "jobs": ["count"]})
    tick = ("nightly", "tick", "--file", "nightly.yaml")
    first = world.json(*tick, expect=1)
    assert [t["status"] for t in first["targets"]] == ["evaluated"]
    assert first["targets"][0]["overall"] == "not_measured"
    again = world.json(*tick, expect=1)
    assert [t["status"] for t in again["targets"]] == ["unchanged"]
    assert len(world.launches()) == 1
    changed = world.project / "best.pt"
    changed.write_bytes(changed.read_bytes() + b"")
    assert [t["status"] for t in world.json(*tick, expect=1)["targets"]] == ["evaluated"]
    assert len(world.run_ids()) == 2


def test_a_tick_takes_up_the_run_that_a_killed_tick_had_started(world: World) -> None:
    write_targets(world, {"name": "best", "checkpoint": "best.pt", "jobs": ["wait"]})
    tick = ("nightly", "tick", "--file", "nightly.yaml")
    killed = world.start(*tick)
    until(lambda: world.launches())
    killed.kill()
    killed.communicate(timeout=30)
    (world.node / "data" / "go").touch()
    summary = world.json(*tick, expect=1)
    assert [t["run_id"] for t in summary["targets"]] == world.launches() == world.run_ids()


def test_a_target_that_cannot_be_reached_does_not_stop_the_others(world: World) -> None:
    write_targets(
        world,
        {"name": "gone", "checkpoint": "none.pt", "jobs": ["count"]},
        {"name": "there", "checkpoint": "lab:best.pt", "cluster": "lab", "jobs": ["count"]},
    )
    summary = world.json("nightly", "tick", "--file", "nightly.yaml", expect=1)
    assert [t["status"] for t in summary["targets"]] == ["error", "evaluated"]


def test_history_is_the_same_after_it_was_rebuilt_from_the_run_folders(world: World) -> None:
    for _ in range(2):
        world.json("--checkpoint", "lab:best.pt", "--jobs", "count")
    before = world.json("history")
    assert [row["run_id"] for row in before] == sorted(world.run_ids(), reverse=True)
    for path in (world.home / "data").glob("remote-eval.sqlite3*"):
        path.unlink()
    assert world.json("history", "--rebuild") == before


def test_a_report_can_be_written_again_without_the_node(world: World) -> None:
    run_id = world.json("--checkpoint", "lab:best.pt", "--jobs", "count")["run_id"]
    folder = world.run_folder(run_id)
    original = (folder / "results.json").read_bytes()
    (folder / "results.json").unlink()
    (folder / "report.html").unlink()
    world.edit_profile(port=1)
    shutil.rmtree(world.node)
    world.json("report", run_id)
    assert (folder / "results.json").read_bytes() == original
    assert (folder / "report.html").exists()


def test_gc_says_what_would_go_and_deletes_only_when_told(world: World) -> None:
    run_id = world.json("--checkpoint", "best.pt", "--jobs", "count")["run_id"]
    root = world.node / "root of ours"
    said = world.json("gc", "--cluster", "lab", "--keep-days", "0", "--keep-gib", "0")
    assert said["dry_run"] is True
    assert (root / "runs" / run_id).exists()
    world.json("gc", "--cluster", "lab", "--keep-days", "0", "--keep-gib", "0", "--delete")
    assert not (root / "runs" / run_id).exists()


def test_the_whole_job_works_over_the_systems_ssh(world: World) -> None:
    world.edit_profile(transport="openssh")
    (world.node / "data" / "best.pt").unlink()
    run_id = world.json("--checkpoint", "best.pt", "--jobs", "count")["run_id"]
    assert world.launches() == []
    assert (world.run_folder(run_id) / "artifacts" / "count" / "numbers.txt").exists()


def test_inspect_says_the_same_of_a_file_on_either_side(world: World) -> None:
    here = world.json("inspect", "best.pt")["header"]
    there = world.json("inspect", "lab:best.pt")["header"]
    assert here["tensors"] == there["tensors"]
    assert "parameters" in world.cli("inspect", "lab:best.pt").stdout


def test_inspect_tells_the_reference_models_entries_of_a_file_of_21_gigabytes(world: World, tmp_path: Path) -> None:
    # In a process of its own, so that no torch of the test's stands behind what inspect says without one.
    write = (
        "import sys, pathlib; from tests.support.checkpoints import write_sparse_reference\n"
        "write_sparse_reference(pathlib.Path(sys.argv[1]))"
    )
    path = tmp_path / "sparse.pt"
    subprocess.run([sys.executable, "-c", write, str(path)], check=True, timeout=120, env=world.environment)
    assert path.stat().st_size > 20e9
    shown = world.cli("inspect", str(path)).stdout
    assert re.search(r"entries +162\n", shown)
    assert re.search(r"parameters +3,500,188,290\n", shown)


def test_the_doctor_passes_a_sound_cluster_and_names_what_is_wrong_with_another(world: World) -> None:
    world.with_torch()
    checks = {c["name"]: c["state"] for c in world.json("doctor", "--cluster", "lab")}
    assert checks["login"] == checks["torch"] == "ok"
    world.edit_profile(user="no-such-user-here")
    checks = {c["name"]: c["state"] for c in world.json("doctor", "--cluster", "lab", expect=5)}
    assert checks["login"] == "error"
