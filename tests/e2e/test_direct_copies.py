"""A copy goes straight from node to node where the first can log in to the second by itself, and else through us."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.errors import ExitCode
from orchestrator.journal import Journal
from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import load_profile
from orchestrator.ssh.connect import connect
from orchestrator.ssh.settings import RetryPolicy
from orchestrator.transfer.direct import DirectWay
from orchestrator.transfer.node_copy import copy_checkpoint, describe
from remote_payload.checkpoint.source import Source
from tests.support.durable import durable_bytes
from tests.support.own_ssh import OwnSsh, make_own_ssh
from tests.support.relay import Relay
from tests.support.sshd import Sshd, find_program, start_sshd
from tests.support.trained import write_trained
from tests.support.world import World, agents_of, digests, make_world, until

MIB = 1024 * 1024
CONTENT = random.Random(7).randbytes(40 * MIB + 5)
COPY = ("fetch", "lab:best.pt", "other:")


@pytest.fixture
def own_ssh(tmp_path: Path) -> OwnSsh:
    """The `ssh` of the account on the first node."""
    return make_own_ssh(tmp_path / "own")


@pytest.fixture
def servers(tmp_path: Path, own_ssh: OwnSsh) -> Iterator[tuple[Sshd, Sshd]]:
    pair = (start_sshd(tmp_path / "a", own_ssh.options), start_sshd(tmp_path / "b"))
    own_ssh.may_log_in_to(pair[1])
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture
def near_link(servers: tuple[Sshd, Sshd]) -> Iterator[Relay]:
    """Between this machine and the first node."""
    relay = Relay(servers[0].port)
    servers[0].also_known_at(relay.port)
    yield relay
    relay.close()


@pytest.fixture
def world(tmp_path: Path, servers: tuple[Sshd, Sshd], near_link: Relay) -> World:
    small = tmp_path / "small.pt"
    small.write_bytes(CONTENT)
    made = make_world(tmp_path, servers[0], small, sys.executable)
    made.add_cluster("other", servers[1], tmp_path / "far")
    edit_profile(made, "lab", port=near_link.port, direct_copies=True)
    edit_profile(made, "other", direct_copies=True)
    return made


def edit_profile(world: World, name: str, **changes: Any) -> None:
    path = world.profile.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


@pytest.fixture
def slow_way(world: World, servers: tuple[Sshd, Sshd], own_ssh: OwnSsh) -> Iterator[Relay]:
    """Between the nodes. What this machine says to the second one goes there too."""
    (world.node / "data" / "small.pt").write_bytes(b"small")
    world.json("fetch", "lab:small.pt", "other:")  # installs the payload
    relay = Relay(servers[1].port, bytes_per_s=6e6)
    servers[1].also_known_at(relay.port)
    own_ssh.may_log_in_to(servers[1])
    edit_profile(world, "other", port=relay.port)
    yield relay
    relay.close()


def save_bf16(world: World, tensors: int) -> bytes:
    """Of 8 MiB each."""
    torch.manual_seed(5)
    state = {str(n): torch.randn(2048, 2048, dtype=torch.bfloat16) * 0.02 for n in range(tensors)}
    torch.save({"model": state}, world.node / "data" / "best.pt")
    return (world.node / "data" / "best.pt").read_bytes()


def far_path(done: dict[str, str]) -> Path:
    return Path(done["checkpoint"].partition(":")[2])


def durable(world: World, tmp_path: Path) -> int:
    return durable_bytes(tmp_path / "far" / "root of ours", [world.node / "data" / "best.pt"])


@pytest.mark.parametrize("transport", ["fabric", "openssh"])
def test_no_byte_of_the_file_comes_through_this_machine(
    world: World, near_link: Relay, own_ssh: OwnSsh, transport: str
) -> None:
    edit_profile(world, "lab", transport=transport)
    ran = world.cli(*COPY, "--json")
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout)
    assert far_path(done).read_bytes() == CONTENT
    assert (done["direct"], done["bytes_sent"]) == (True, len(CONTENT))
    assert "lab sends to other itself" in done["way"]
    assert near_link.bytes_carried < len(CONTENT) / 10
    assert own_ssh.calls
    *_, last = (json.loads(line) for line in ran.stderr.splitlines())
    assert (last["event"], last["bytes_done"], last["bytes_total"]) == ("transfer", len(CONTENT), len(CONTENT))


def test_floats_go_packed_where_the_link_between_the_nodes_is_slow(
    world: World, near_link: Relay, slow_way: Relay
) -> None:
    content = save_bf16(world, tensors=6)
    before = near_link.bytes_carried
    ran = world.cli(*COPY, "--json")
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout)
    assert done["direct"]
    assert far_path(done).read_bytes() == content
    assert near_link.bytes_carried - before < len(content) / 10
    assert slow_way.bytes_carried < 0.9 * len(content)
    assert done["bytes_sent"] < slow_way.bytes_carried
    *_, last = (json.loads(line) for line in ran.stderr.splitlines())
    assert last["saved"]["packed"] == len(content) - done["bytes_sent"]


def test_a_profile_can_say_that_floats_go_as_they_are(world: World, slow_way: Relay) -> None:
    content = save_bf16(world, tensors=4)
    edit_profile(world, "lab", pack_floats=False)
    done = world.json(*COPY)
    assert (done["direct"], done["bytes_sent"]) == (True, len(content))
    assert slow_way.bytes_carried > len(content)


def test_the_way_that_was_taken_is_said_in_a_line(world: World) -> None:
    said = world.cli(*COPY).stderr
    assert "lab sends to other itself" in said


def test_the_login_takes_nothing_of_the_user_s_along_and_asks_nobody(world: World, own_ssh: OwnSsh) -> None:
    world.json(*COPY)
    for call in own_ssh.calls:
        words = call.split(" ")
        for option in ("BatchMode=yes", "StrictHostKeyChecking=yes", "ForwardAgent=no", "ControlMaster=no"):
            assert option in words
        assert "PreferredAuthentications=gssapi-with-mic,hostbased,publickey" in words


@pytest.mark.parametrize(
    ("configured", "wanted"),
    [
        ("aes256-ctr,aes128-gcm@openssh.com", "Ciphers=aes128-gcm@openssh.com,aes256-ctr"),
        ("aes256-ctr", ""),
    ],
)
def test_the_fastest_cipher_that_the_account_allows_goes_first(
    world: World, servers: tuple[Sshd, Sshd], own_ssh: OwnSsh, configured: str, wanted: str
) -> None:
    own_ssh.may_log_in_to(servers[1], more=[f"  Ciphers {configured}"])
    assert world.json(*COPY)["direct"]
    told = {word for call in own_ssh.calls for word in call.split(" ") if word.startswith("Ciphers=")}
    assert told == ({wanted} if wanted else set())


def test_a_folder_goes_straight_with_all_its_files(world: World, near_link: Relay) -> None:
    folder = world.node / "data" / "step 5"
    (folder / "below").mkdir(parents=True)
    (folder / "large").write_bytes(CONTENT)
    for number in range(100):
        (folder / "below" / f"part {number}").write_bytes(random.Random(number).randbytes(100_000))
    done = world.json("fetch", "lab:step 5", "other:")
    assert digests(far_path(done)) == digests(folder)
    assert done["direct"]
    assert near_link.bytes_carried < 5_000_000


def test_a_folder_that_goes_straight_takes_one_login_for_all_its_files(world: World, own_ssh: OwnSsh) -> None:
    folder = world.node / "data" / "step 5"
    folder.mkdir()
    for number in range(4):
        (folder / f"shard {number}").write_bytes(random.Random(number).randbytes(9 * MIB))
    done = world.json("fetch", "lab:step 5", "other:", "--streams", "1")
    assert digests(far_path(done)) == digests(folder)
    assert done["direct"]
    assert len(own_ssh.calls) == 1


@pytest.mark.parametrize(
    ("account", "reason"),
    [
        ({"knows_host": False}, "Host key verification failed"),
        ({"has_key": False}, "Permission denied"),
    ],
)
def test_where_the_login_is_refused_it_is_tried_once_and_all_goes_through_us(
    world: World, servers: tuple[Sshd, Sshd], own_ssh: OwnSsh, account: dict[str, bool], reason: str
) -> None:
    own_ssh.may_log_in_to(servers[1], **account)
    folder = world.node / "data" / "step 5"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_bytes(name.encode() + CONTENT)
    done = world.cli("fetch", "lab:step 5", "other:")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "go through this machine" in line]
    assert reason in line
    assert len(own_ssh.calls) == 1
    assert world.json("fetch", "lab:step 5", "other:")["bytes_sent"] == 0


def test_a_node_that_does_not_answer_the_other_is_given_up_soon(
    world: World, servers: tuple[Sshd, Sshd], own_ssh: OwnSsh
) -> None:
    own_ssh.may_log_in_to(servers[1], more=["  ProxyCommand sleep 5000"])
    edit_profile(world, "other", connect_timeout_s=2)
    done = world.json(*COPY)
    assert far_path(done).read_bytes() == CONTENT
    assert done["direct"] is False
    assert "timed out" in done["way"]
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True, timeout=30).stdout
    assert "sleep 5000" not in listed


def test_a_node_without_ssh_is_no_hindrance(world: World, own_ssh: OwnSsh) -> None:
    (own_ssh.folder / "ssh").write_text("#!/nowhere\n")
    done = world.json(*COPY)
    assert far_path(done).read_bytes() == CONTENT
    assert done["direct"] is False


@pytest.mark.parametrize("profile", ["lab", "other"])
def test_a_site_can_forbid_it(world: World, own_ssh: OwnSsh, profile: str) -> None:
    edit_profile(world, profile, direct_copies=False)
    assert world.json(*COPY)["direct"] is False
    assert own_ssh.calls == []


def test_what_is_not_worth_a_login_gets_none(world: World, own_ssh: OwnSsh) -> None:
    (world.node / "data" / "best.pt").write_bytes(CONTENT[: 4 * MIB])
    assert world.json(*COPY)["direct"] is False
    assert own_ssh.calls == []


def test_a_node_that_has_the_file_is_not_logged_in_to(world: World, own_ssh: OwnSsh) -> None:
    first = world.json(*COPY)
    logins = len(own_ssh.calls)
    again = world.json(*COPY)
    assert (again["checkpoint"], again["bytes_sent"], again["direct"]) == (first["checkpoint"], 0, False)
    assert len(own_ssh.calls) == logins > 0


def nodes_of(world: World, tmp_path: Path, servers: tuple[Sshd, Sshd]) -> tuple[Node, Node]:
    layout = LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")
    payload = build_payload(layout)
    near, far = (
        Node(
            load_profile(str(world.profile.with_name(f"{name}.yaml")), layout, None).profile,
            payload,
            lambda server=server: connect(server.settings(), RetryPolicy(30.0), sockets_folder=tmp_path / "s"),  # type: ignore[misc]
        )
        for name, server in zip(("lab", "other"), servers, strict=True)
    )
    return near, far


def test_a_name_that_leads_to_another_machine_there_is_noticed(
    world: World, tmp_path: Path, servers: tuple[Sshd, Sshd]
) -> None:
    """From here the second node is another than the one that its name means to the first."""
    near, far = nodes_of(world, tmp_path, servers)
    told: list[str] = []
    with near as source, far as target:
        target._hello = dataclasses.replace(target.hello, machine_id="0" * 32)
        way = DirectWay(source, target, ("lab", "other"), told.append)
        described = describe(source, str(world.node / "data" / "best.pt"))
        done = copy_checkpoint(source, described, target, way=way)
    assert Path(done.path).read_bytes() == CONTENT
    (line,) = told
    assert "another machine" in line


def test_chunks_that_are_asked_for_alone_go_straight_too_and_the_other_node_is_asked_for_them(
    world: World, tmp_path: Path, servers: tuple[Sshd, Sshd]
) -> None:
    near, far = nodes_of(world, tmp_path, servers)
    with near as source, far as target:
        way = DirectWay(source, target, ("lab", "other"), lambda _: None)
        described = describe(source, str(world.node / "data" / "best.pt"))
        asked = [len(described.manifest.chunks) - 1, 0]
        done = copy_checkpoint(source, described, target, way=way, order=asked)
        wanted = [described.manifest.chunks[index] for index in asked]
        assert (done.is_complete, done.is_direct) == (False, True)
        assert done.bytes_sent == sum(chunk.length for chunk in wanted)
        with Source(done.path) as kept:
            for chunk in wanted:
                assert kept.read(chunk.offset, chunk.length) == CONTENT[chunk.offset : chunk.offset + chunk.length]
        whole = copy_checkpoint(source, described, target, way=way)
    assert (whole.is_complete, whole.bytes_sent) == (True, len(CONTENT) - done.bytes_sent)
    assert Path(whole.path).read_bytes() == CONTENT


def test_a_run_s_checkpoint_comes_straight_and_a_second_node_that_is_lost_is_waited_for(
    world: World, servers: tuple[Sshd, Sshd], tmp_path: Path
) -> None:
    torch.save({"w": torch.frombuffer(bytearray(CONTENT[: 40 * MIB]), dtype=torch.float32)}, tmp_path / "best.pt")
    (tmp_path / "best.pt").replace(world.node / "data" / "best.pt")
    edit_profile(world, "other", bandwidth_limit_mbps=40)
    client = world.start("--cluster", "other", "--checkpoint", "lab:best.pt", "--jobs", "count")
    until(lambda: durable(world, tmp_path) >= 8 * MIB)
    servers[1].kill_sessions()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert "lab sends to other itself" in output
    assert "lab can no longer send to other itself" in output
    stored = [path.read_bytes() for path in (tmp_path / "far" / "root of ours" / "checkpoints").glob("*/file")]
    assert (world.node / "data" / "best.pt").read_bytes() in stored


def test_a_login_that_dies_in_the_middle_leaves_the_rest_to_us(world: World, tmp_path: Path, own_ssh: OwnSsh) -> None:
    client = world.start(*COPY, "--bandwidth-limit", "40")
    until(lambda: durable(world, tmp_path) >= 8 * MIB)
    assert own_ssh.kill()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert "lab can no longer send to other itself" in output
    (stored,) = (tmp_path / "far" / "root of ours" / "checkpoints").glob("*/file")
    assert stored.read_bytes() == CONTENT


def test_a_lost_connection_to_the_first_node_is_made_again_and_the_way_stays(
    world: World, tmp_path: Path, near_link: Relay
) -> None:
    client = world.start(*COPY, "--bandwidth-limit", "40")
    until(lambda: durable(world, tmp_path) >= 8 * MIB)
    near_link.cut()
    output, _ = client.communicate(timeout=100)
    assert client.returncode == 0, output
    assert "go through this machine" not in output
    (stored,) = (tmp_path / "far" / "root of ours" / "checkpoints").glob("*/file")
    assert stored.read_bytes() == CONTENT
    assert near_link.bytes_carried < len(CONTENT) / 4


def test_a_killed_client_ends_the_nodes_logins_and_the_next_sends_the_rest(
    world: World, tmp_path: Path, own_ssh: OwnSsh
) -> None:
    client = world.start(*COPY, "--bandwidth-limit", "40")
    until(lambda: durable(world, tmp_path) >= 8 * MIB)
    client.kill()
    client.communicate(timeout=30)
    until(lambda: not own_ssh.pids())
    until(lambda: not agents_of(world))
    before = durable(world, tmp_path)
    assert 0 < before < len(CONTENT)
    done = world.json(*COPY)
    assert far_path(done).read_bytes() == CONTENT
    assert (done["direct"], done["bytes_sent"]) == (True, len(CONTENT) - before)


LYING_SSH = """\
#!{python}
import glob, os, subprocess, sys
process = subprocess.Popen(["{ssh}", "-F", "{config}", *sys.argv[1:]], stdout=subprocess.PIPE)
while data := os.read(process.stdout.fileno(), 65536):
    for path in glob.glob("{stored}") if b'"path"' in data else ():
        os.unlink(path)
    os.write(1, data)
"""


def test_a_node_that_says_what_is_not_so_is_not_believed(world: World, tmp_path: Path, own_ssh: OwnSsh) -> None:
    """The file is gone by the time that the first node says that it has arrived."""
    stored = tmp_path / "far" / "root of ours" / "checkpoints" / "*" / "file"
    words = {"python": sys.executable, "ssh": find_program("ssh"), "config": own_ssh.folder / "config"}
    (own_ssh.folder / "ssh").write_text(LYING_SSH.format(stored=stored, **words))
    refused = world.json(*COPY, expect=int(ExitCode.INTEGRITY))
    assert "not where the node that sent it says" in refused["cause"]


def test_a_file_that_changes_on_the_way_is_an_error(world: World, tmp_path: Path) -> None:
    client = world.start(*COPY, "--bandwidth-limit", "40")
    until(lambda: durable(world, tmp_path) >= 8 * MIB)
    with (world.node / "data" / "best.pt").open("r+b") as file:
        file.write(b"changed")
    output, _ = client.communicate(timeout=100)
    assert client.returncode == ExitCode.INTEGRITY, output
    assert "changed while it was copied" in output
    assert list((tmp_path / "far" / "root of ours" / "checkpoints").glob("*/file")) == []


@pytest.mark.parametrize("may_log_in", [True, False])
def test_a_job_begins_early_whichever_way_the_bytes_go_and_a_login_that_is_refused_is_tried_once_for_all_of_them(
    world: World, servers: tuple[Sshd, Sshd], near_link: Relay, own_ssh: OwnSsh, *, may_log_in: bool
) -> None:
    own_ssh.may_log_in_to(servers[1], has_key=may_log_in)
    local = world.node / "data" / "trained.pt"
    write_trained(local, 448)
    done = world.cli("--cluster", "other", "--checkpoint", "lab:trained.pt", "--jobs", "health")
    assert done.returncode in (0, 1), done.stderr
    assert "health begins, and reads the rest as it comes" in done.stderr
    (run_id,) = world.run_ids()
    kinds = [entry.kind for entry in Journal(world.home / "data" / "remote-eval.sqlite3").entries(run_id)]
    assert kinds.index("synced_partly") < kinds.index("launched") < kinds.index("synced") < kinds.index("terminal")
    found = json.loads((world.run_folder(run_id) / "provenance.json").read_text())["checkpoint"]
    assert (found["how"], found["is_complete"]) == ("copied", True)
    assert Path(found["path"]).read_bytes() == local.read_bytes()
    if may_log_in:
        assert near_link.bytes_carried < local.stat().st_size / 10
    else:
        assert len(own_ssh.calls) == 1
        assert done.stderr.count("go through this machine") == 1
