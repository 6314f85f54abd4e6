"""`remote-eval fetch` as a person types it, from a node behind a real sshd."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.fetch import check_names
from orchestrator.errors import ExitCode, IntegrityError
from tests.support.sshd import start_sshd
from tests.support.world import World, digests, make_world, until

CONTENT = random.Random(5).randbytes(20 * 1024 * 1024 + 17)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    small = tmp_path / "small.pt"
    small.write_bytes(CONTENT)
    server = start_sshd(tmp_path / "sshd")
    yield make_world(tmp_path, server, small, sys.executable)
    server.stop()


def test_a_file_comes_verified_under_its_own_name_and_again_costs_nothing(world: World) -> None:
    done = world.json("fetch", "lab:best.pt", str(world.home), "--streams", "2")
    assert (world.home / "best.pt").read_bytes() == CONTENT
    assert done["bytes_received"] == len(CONTENT)
    again = world.json("fetch", "lab:best.pt", str(world.home))
    assert (again["bytes_received"], again["files"][0]["how"]) == (0, "unchanged")


def test_progress_goes_to_stderr_as_json_lines_and_the_document_alone_to_stdout(world: World) -> None:
    done = world.cli("fetch", "lab:best.pt", str(world.home), "--json")
    assert json.loads(done.stdout)["bytes"] == len(CONTENT)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {event["event"] for event in events} == {"transfer"}
    assert events[-1]["bytes_done"] == events[-1]["bytes_total"] == len(CONTENT)


def test_a_fetch_that_a_person_ends_says_that_it_can_be_gone_on_with_and_speaks_of_no_job(world: World) -> None:
    client = world.start("fetch", "lab:best.pt", str(world.home), "--bandwidth-limit", "0.1")
    until(lambda: list(world.home.glob(".remote-eval-*.spans")))
    client.send_signal(signal.SIGINT)
    said, _ = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "interrupted; what has arrived is kept: the same command goes on with it" in said
    assert "job" not in said


def test_another_file_is_not_overwritten_unless_forced(world: World) -> None:
    target = world.home / "mine.pt"
    target.write_bytes(b"mine")
    refused = world.cli("fetch", "lab:best.pt", str(target))
    assert refused.returncode == ExitCode.USAGE
    assert "--force" in refused.stderr
    assert target.read_bytes() == b"mine"
    world.json("fetch", "lab:best.pt", str(target), "--force")
    assert target.read_bytes() == CONTENT


def test_a_folder_comes_with_everything_in_it(world: World) -> None:
    shards = world.node / "data" / "shards"
    (shards / "below").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "below/x.safetensors"):
        (shards / name).write_bytes(name.encode() * 1000)
    world.json("fetch", "lab:shards", str(world.home))
    assert digests(world.home / "shards") == digests(shards)


def test_a_folder_that_is_here_in_part_is_completed(world: World) -> None:
    shards = world.node / "data" / "shards"
    shards.mkdir()
    for number in range(3):
        (shards / f"large {number}").write_bytes(CONTENT[number:])
        (shards / f"small {number}").write_bytes(f"{number}".encode() * 1000)
    world.json("fetch", "lab:shards", str(world.home))
    for name in ("large 1", "small 2"):
        (world.home / "shards" / name).unlink()
    again = world.json("fetch", "lab:shards", str(world.home))
    assert again["bytes_received"] == len(CONTENT) - 1 + 1000
    assert digests(world.home / "shards") == digests(shards)


def test_a_stream_that_has_brought_one_file_of_a_folder_brings_the_others(world: World) -> None:
    def sessions_of_fetching(files: int) -> int:
        folder = world.node / "data" / f"of {files}"
        folder.mkdir()
        for number in range(files):
            (folder / f"shard {number}").write_bytes(CONTENT[number:])
        before = world.sshd.log.count("Starting session")
        world.json("fetch", f"lab:{folder.name}", str(world.home), "--streams", "1")
        assert digests(world.home / folder.name) == digests(folder)
        return world.sshd.log.count("Starting session") - before

    sessions_of_fetching(2)  # installs the payload
    assert sessions_of_fetching(4) == sessions_of_fetching(1) > 0


def test_what_is_not_there_is_said_in_a_sentence(world: World) -> None:
    missing = world.cli("fetch", "lab:nowhere.pt", str(world.home))
    assert missing.returncode == ExitCode.USAGE
    assert "there is no" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("name", ["../x", "a//b", "a/../b", "/etc/passwd", "a\x1b[31m", "a\\b", ".remote-eval-x", "a/"])
def test_a_name_from_the_node_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError):
        check_names([name])


def test_a_file_whose_own_name_is_odd_comes_under_the_one_that_it_is_given(world: World) -> None:
    (world.node / "data" / "odd \x1b[31m\n.pt").write_bytes(b"mine")
    refused = world.cli("fetch", "lab:odd \x1b[31m\n.pt", str(world.home))
    assert refused.returncode == ExitCode.USAGE
    assert "own name" in refused.stderr
    assert "\x1b" not in refused.stderr
    world.json("fetch", "lab:odd \x1b[31m\n.pt", str(world.home / "plain.pt"))
    assert (world.home / "plain.pt").read_bytes() == b"mine"


def test_names_that_differ_by_case_alone_are_refused() -> None:
    with pytest.raises(IntegrityError):
        check_names(["a", "A"])
