"""Whatever is wrong gets a clear error with its own exit code, and loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import hostile_pickles
from tests.support.world import World

HOSTILE_NAMES = [
    "with space",
    "quo'te\"s",
    "$(touch pwned)",
    "`touch pwned`",
    "new\nline",
    "naïve-日本",
    "-rf",
    "semi;colon&",
]


def test_a_missing_checkpoint_is_said_to_be_missing_on_either_side(world: World) -> None:
    here = world.json("--checkpoint", "runs/none.pt", expect=2)
    assert "there is no file at" in here["cause"]
    there = world.json("--checkpoint", "lab:none.pt", expect=2)
    assert f"lab:{world.node / 'data' / 'none.pt'}" in there["cause"]


def test_a_folder_without_one_is_no_checkpoint(world: World) -> None:
    assert "is a folder, and holds no checkpoint" in world.json("--checkpoint", "my_jobs", expect=2)["cause"]
    (world.node / "data" / "folder").mkdir()
    world.with_torch()
    world.json("--checkpoint", "lab:folder", "--jobs", "health", expect=2)


@pytest.mark.parametrize("content", [b"", b"just some text\n" * 100, b"\x89PNG\r\n\x1a\n" + b"\0" * 500])
def test_a_file_of_another_kind_is_refused_before_anything_is_sent(world: World, content: bytes) -> None:
    (world.project / "notes.pt").write_bytes(content)
    world.json("--checkpoint", "notes.pt", expect=2)
    assert not (world.node / "root of ours" / "runs").exists()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_unless_health_is_to_report_it(
    world: World, small_checkpoint: Path, keep: float
) -> None:
    data = small_checkpoint.read_bytes()
    (world.project / "cut.pt").write_bytes(data[: int(len(data) * keep)])
    world.with_torch()
    error = world.json("--checkpoint", "cut.pt", "--jobs", "health,count", expect=7)
    assert "truncated" in error["cause"]
    assert "--jobs health" in error["action"]
    assert not (world.node / "root of ours").exists()
    result = world.json("--checkpoint", "cut.pt", "--jobs", "health", expect=1)
    assert result["verdict"]["dimensions"]["integrity"] == "fail"


def test_a_pickle_that_would_run_code_does_not_and_is_named(world: World, tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    for name, data in hostile_pickles(marker).items():
        path = world.project / f"{name}.pt"
        path.write_bytes(data)
        refused = world.cli("--checkpoint", path.name, "--jobs", "count", "--json")
        assert refused.returncode in (2, 7), (name, refused.stdout, refused.stderr)
        world.cli("inspect", path.name)
    world.with_torch()
    result = world.cli("--checkpoint", f"{next(iter(hostile_pickles(marker)))}.pt", "--jobs", "health")
    assert result.returncode in (1, 2), result.stdout
    assert not marker.exists()
    assert not world.launches()


def test_a_config_with_an_unknown_key_is_refused_with_file_line_and_field(world: World) -> None:
    (world.project / "eval.yaml").write_text("remote_eval:\n  batchsize: 3\n")
    error = world.json("--checkpoint", "best.pt", "--config", "eval.yaml", expect=2)
    assert "eval.yaml:2: field 'remote_eval.batchsize': unknown key" in error["cause"]
    assert "batch_size" in error["action"]


def test_a_cluster_that_does_not_exist_is_answered_with_the_nearest(world: World) -> None:
    assert "Did you mean lab" in world.json("--cluster", "labb", "--checkpoint", "best.pt", expect=2)["action"]


def test_an_unknown_host_key_is_refused_with_the_fix(world: World, tmp_path: Path) -> None:
    empty = tmp_path / "known_hosts"
    empty.touch()
    world.edit_profile(known_hosts_file=str(empty))
    error = world.json("--checkpoint", "lab:best.pt", expect=3)
    assert error["error"] == "HostKeyError"
    assert "SHA256:" in error["cause"] + error["details"] + error["action"]


def test_a_changed_host_key_is_refused_and_both_keys_are_named(world: World, tmp_path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True, timeout=30
    )
    known = tmp_path / "known_hosts"
    kind, key, *_ = (tmp_path / "other.pub").read_text().split()
    port = world.profile_field("port")
    known.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    world.edit_profile(known_hosts_file=str(known))
    error = world.json("--checkpoint", "lab:best.pt", expect=3)
    assert error["error"] == "HostKeyError"
    assert "ssh-keygen" in error["action"]


@pytest.mark.parametrize("transport", ["fabric", "openssh"])
def test_a_key_that_the_server_refuses_is_named_and_not_tried_again(
    world: World, tmp_path: Path, transport: str
) -> None:
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)
    world.edit_profile(identity_files=[str(key)], transport=transport)
    before = world.sshd.log.count("Connection from")
    error = world.json("--checkpoint", "lab:best.pt", expect=3)
    assert error["error"] == "LoginRefusedError"
    assert str(key) in error["cause"] + error["details"] + error["action"]
    assert world.sshd.log.count("Connection from") - before == 1


@pytest.mark.parametrize("transport", ["fabric", "openssh"])
def test_a_wrong_user_is_an_authentication_error(world: World, transport: str) -> None:
    world.edit_profile(user="no-such-user-here", transport=transport)
    assert world.json("--checkpoint", "lab:best.pt", expect=3)["error"] == "LoginRefusedError"


def test_a_closed_port_is_retried_for_the_profiles_patience_and_then_pauses(world: World) -> None:
    world.edit_profile(port=1, retry={"patience_s": 2})
    error = world.json("--checkpoint", "lab:best.pt", expect=4)
    assert error["owner"] == "network"


def test_a_node_without_the_named_python_is_unfit(world: World) -> None:
    world.edit_profile(python={"path": "/opt/none/bin/python"})
    assert "/opt/none/bin/python" in world.json("--checkpoint", "lab:best.pt", expect=5)["cause"]


def test_a_node_without_torch_is_unfit_for_health(world: World) -> None:
    assert "torch" in world.json("--checkpoint", "lab:best.pt", "--jobs", "health", expect=5)["cause"]
    assert not (world.node / "root of ours" / "runs").exists()


def test_a_root_of_somebody_else_is_left_as_it_is(world: World) -> None:
    theirs = world.node / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    world.edit_profile(node_root=str(theirs))
    world.json("--checkpoint", "lab:best.pt", expect=5)
    assert [p.name for p in theirs.iterdir()] == ["thesis.tex"]


def test_a_root_that_cannot_be_written_is_unfit(world: World) -> None:
    world.edit_profile(node_root="/proc/remote-eval")
    assert "/proc/remote-eval" in world.json("--checkpoint", "lab:best.pt", expect=5)["cause"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_character_in_a_path_or_name_is_anything_but_itself(world: World, name: str) -> None:
    folder = world.node / "data" / name
    folder.mkdir()
    (folder / f"{name}.pt").write_bytes((world.node / "data" / "best.pt").read_bytes())
    local = world.project / f"x {name}.pt"
    local.write_bytes((world.project / "best.pt").read_bytes()[:-1] + b"!")
    world.edit_profile(node_root=str(world.node / f"root {name}"))
    world.json("--checkpoint", f"lab:{folder / name}.pt", "--jobs", "count")
    world.cli("inspect", f"./x {name}.pt")
    report = world.run_folder(world.run_ids()[-1]) / "report.html"
    assert report.exists()
    for place in (world.project, world.node, world.node / "data", world.sshd.home, Path.home(), Path.cwd()):
        assert not (place / "pwned").exists()


def test_a_full_disk_on_the_node_is_said_and_the_run_goes_on_once_there_is_space(world: World, tmp_path: Path) -> None:
    small = tmp_path / "small disk"
    small.mkdir()
    size = (world.project / "best.pt").stat().st_size
    blob = world.project / "big.pt"
    make_big_checkpoint(blob)
    assert blob.stat().st_size > size
    with mounted_tmpfs(small, 8 * 1024 * 1024):
        world.edit_profile(node_root=str(small / "root"))
        error = world.json("--checkpoint", "big.pt", "--jobs", "count", expect=5)
        assert "space" in error["cause"] + error["action"] + error["details"]
        (run_id,) = world.run_ids()
        subprocess.run(["mount", "-o", "remount,size=96m", str(small)], check=True, timeout=30)
        assert world.json("resume", run_id)["run_id"] == run_id


def make_big_checkpoint(path: Path) -> None:
    import torch

    torch.save({"model_state_dict": {"w.weight": torch.randn(4_000_000)}}, path)


class mounted_tmpfs:
    """A small disk of its own. Needs the right to mount, as root in a container or CI has."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size_bytes}", "tmpfs", str(self._folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            pytest.fail(f"this test mounts a small disk and may not: {done.stderr}; run it as root")

    def __exit__(self, *exc_info: object) -> None:
        subprocess.run(["umount", "-l", str(self._folder)], check=False, timeout=30)


def test_help_needs_none_of_the_heavy_libraries(world: World) -> None:
    program = (
        "import sys; sys.argv = ['remote-eval', '--help']\n"
        "from orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'paramiko', 'fabric', 'pydantic', 'yaml', 'asyncssh'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_an_option_in_front_of_a_sub_command_is_refused_rather_than_ignored(world: World) -> None:
    assert world.cli("--json", "status").returncode == 2


def test_an_unknown_run_is_a_usage_error(world: World) -> None:
    for command in ("status", "logs", "resume", "cancel", "collect", "report"):
        assert world.json(command, "20200101-000000-abcdef", expect=2)["error"] == "UsageError"
        assert world.json(command, "../../etc", expect=2)["error"] == "UsageError"
