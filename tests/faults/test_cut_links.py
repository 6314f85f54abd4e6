"""Whole runs over a link that is cut, refused and silent: lost contact is never taken for failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.relay import Relay, relay_to
from tests.support.world import World, until


@pytest.fixture
def relay(world: World) -> Iterator[Relay]:
    """Between the client and the node; the host key is known under its port."""
    with relay_to(world.sshd.port) as relay:
        known = world.home / "known_hosts"
        known.write_text(world.sshd.known_hosts.read_text().replace(str(world.sshd.port), str(relay.port)))
        world.edit_profile(port=relay.port, known_hosts_file=str(known))
        yield relay


def start_waiting(world: World) -> str:
    run_id: str = world.json("--checkpoint", "lab:best.pt", "--jobs", "wait", "--detach")["run_id"]
    until(lambda: world.launches())
    return run_id


def logins_at(world: World) -> int:
    return world.sshd.log.count("Accepted publickey")


@pytest.mark.parametrize("transport", ["fabric", "openssh"])
def test_cuts_while_following_are_survived_without_a_second_launch(world: World, relay: Relay, transport: str) -> None:
    world.edit_profile(transport=transport, retry={"patience_s": 60})
    run_id = start_waiting(world)
    logins = logins_at(world)
    client = world.start("resume", run_id)
    for cut in range(3):
        until(lambda cut=cut: logins_at(world) > logins + cut)
        relay.cut()
    (world.node / "data" / "go").touch()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert world.launches() == [run_id]
    assert relay.connections_made >= 4


def test_a_link_that_stays_down_pauses_the_run_which_then_resumes(world: World, relay: Relay) -> None:
    world.edit_profile(retry={"patience_s": 2})
    run_id = start_waiting(world)
    client = world.start("resume", run_id)
    made = relay.connections_made
    until(lambda: relay.connections_made > made)
    relay.refuse()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 4, output
    assert "network" in output
    relay.mend()
    (world.node / "data" / "go").touch()
    assert world.json("resume", run_id)["run_id"] == run_id
    assert world.launches() == [run_id]


def test_a_black_hole_ends_in_a_bounded_time_and_not_in_a_hang(world: World, relay: Relay) -> None:
    world.edit_profile(command_timeout_s=3.0, retry={"patience_s": 2}, connect_timeout_s=2.0)
    run_id = start_waiting(world)
    client = world.start("resume", run_id)
    made = relay.connections_made
    until(lambda: relay.connections_made > made)
    relay.hold()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 4, output
    relay.mend()
    relay.cut()
    (world.node / "data" / "go").touch()
    assert world.json("resume", run_id)["run_id"] == run_id
    assert world.launches() == [run_id]


def test_one_login_serves_all_stages(world: World, relay: Relay) -> None:
    run_id = world.json("--checkpoint", "best.pt", "--jobs", "count")["run_id"]
    assert '"logins": 1' in (world.run_folder(run_id) / "provenance.json").read_text()
    assert relay.connections_made == 1
