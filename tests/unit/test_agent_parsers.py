"""Answers of the system's commands, recorded, and what is concluded from them."""

from __future__ import annotations

import pytest

from remote_payload.agent import environment, gpus, quota, sessions
from remote_payload.agent.child import describe_exit, last_line
from remote_payload.probe import gpu_findings, version_numbers
from remote_payload.wire.plan import GpuPolicy
from remote_payload.wire.results import Severity

DEVICES = (
    "0, GPU-5ae2, NVIDIA A100-SXM4-80GB, 81920, 81000, 535.104.05\n"
    "1, GPU-77b1, NVIDIA A100-SXM4-80GB, 81920, 20000, 535.104.05\n"
    "2, GPU-9c0d, NVIDIA A100-SXM4-80GB, [N/A], [N/A], 535.104.05\n"
    "No devices were found\n"
)
PROCESSES = "GPU-77b1, 31337\nGPU-77b1, 31338\nGPU-5ae2, [N/A]\n"

QUOTA = """Disk quotas for user ada (uid 1001):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
/dev/sda1   1048576* 1000000 2000000   6days   10000       0       0
nfs:/home   500 0 0 7 0 0
"""
LUSTRE = "/scratch/ada  1024 2048 4096 - 12 0 0 -\n"
MOUNTS = (
    "rootfs / ext4 rw 0 0\n"
    "nfs:/home /home nfs4 rw 0 0\n"
    "10.0.0.1@o2ib:/scratch /scratch lustre rw 0 0\n"
    "/dev/sdb1 /home/my\\040disk ext4 rw 0 0\n"
)


def test_gpus_are_told_with_their_memory_and_processes() -> None:
    found = gpus.parse_gpus(DEVICES, PROCESSES)
    assert [(gpu.index, gpu.uuid, gpu.process_ids) for gpu in found] == [
        (0, "GPU-5ae2", ()),
        (1, "GPU-77b1", (31337, 31338)),
    ]
    assert found[0].free_bytes == 81000 * 1024**2
    assert found[0].driver_version == "535.104.05"


def test_the_emptiest_gpu_comes_first_and_anothers_is_left_alone() -> None:
    found = gpus.parse_gpus(DEVICES, PROCESSES)
    assert [gpu.index for gpu in gpus.in_order_of_preference(found, GpuPolicy())] == [0]
    shared = gpus.in_order_of_preference(reversed(found), GpuPolicy(allow_shared=True))
    assert [gpu.index for gpu in shared] == [0, 1]
    assert gpus.in_order_of_preference(found, GpuPolicy(min_free_bytes=80 * 1024**3)) == []


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1]), ("", []), ("1", [1]), ("1,0", [0, 1]), ("GPU-77", [1]), ("NoDevFiles", []), ("5", [])],
)
def test_an_inherited_allocation_is_a_bound(visible: str | None, indices: list[int]) -> None:
    found = gpus.parse_gpus(DEVICES, PROCESSES)
    assert [gpu.index for gpu in gpus.allowed_by_environment(found, visible)] == indices


@pytest.mark.parametrize(
    ("device", "found", "expected"),
    [
        ("cuda", "", [("node.no_gpu", Severity.ERROR)]),
        ("auto", "", [("node.no_gpu", Severity.INFO)]),
        ("cuda", DEVICES, []),
        ("auto", DEVICES.replace("81000", "10"), [("node.gpu_busy", Severity.WARNING)]),
        ("cuda", DEVICES.replace("81000", "10"), [("node.gpu_busy", Severity.ERROR)]),
    ],
)
def test_a_missing_gpu_refuses_only_a_run_that_needs_one(
    device: str, found: str, expected: list[tuple[str, Severity]]
) -> None:
    findings = gpu_findings(GpuPolicy(device=device), gpus.parse_gpus(found, PROCESSES))
    assert [(finding.id, finding.severity) for finding in findings] == expected


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.6.0+cu124", (2, 6)), ("2.10.0a0+git1", (2, 10)), ("1.13", (1, 13)), ("nightly", (0, 0)), ("", (0, 0))],
)
def test_version_numbers_are_compared_as_numbers(version: str, numbers: tuple[int, int]) -> None:
    assert version_numbers(version) == numbers


def test_the_tighter_of_two_quota_limits_counts() -> None:
    assert quota.parse_quota(QUOTA, "/dev/sda1") == 0
    assert quota.parse_quota(QUOTA.replace("1048576*", "400000"), "/dev/sda1") == 600000 * 1024
    assert quota.parse_quota(LUSTRE, "other", "/scratch/ada") == 1024 * 1024


def test_no_limit_and_no_line_mean_no_quota() -> None:
    assert quota.parse_quota(QUOTA, "nfs:/home") is None
    assert quota.parse_quota(QUOTA, "/dev/absent") is None
    assert quota.parse_quota("", "") is None


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/home/ada/x", ("/home", "nfs:/home", "nfs4")),
        ("/homes", ("/", "rootfs", "ext4")),
        ("/scratch", ("/scratch", "10.0.0.1@o2ib:/scratch", "lustre")),
        ("/home/my disk/x", ("/home/my disk", "/dev/sdb1", "ext4")),
    ],
)
def test_a_path_lies_on_its_deepest_mount(path: str, mount: tuple[str, str, str]) -> None:
    assert quota.mount_of(path, MOUNTS) == mount


@pytest.mark.parametrize(
    ("properties", "kills"),
    [
        ("KillUserProcesses=yes\nKillOnlyUsers=\nKillExcludeUsers=root\n", True),
        ("KillUserProcesses=no\n", False),
        ("KillUserProcesses=yes\nKillOnlyUsers=\nKillExcludeUsers=root ada\n", False),
        ("KillUserProcesses=yes\nKillOnlyUsers=bob\nKillExcludeUsers=\n", False),
        ("KillUserProcesses=yes\nKillOnlyUsers=bob ada\nKillExcludeUsers=\n", True),
        ("", False),
    ],
)
def test_logind_kills_only_whom_it_says(properties: str, kills: bool) -> None:
    assert sessions.kills_processes_of("ada", properties) is kills


def test_a_scope_of_the_users_systemd_is_used_only_where_sessions_are_killed() -> None:
    assert sessions.detached_prefix(sessions.SessionRules(False, True)) == ("setsid", [])
    assert sessions.detached_prefix(sessions.SessionRules(True, False)) == ("setsid", [])
    method, prefix = sessions.detached_prefix(sessions.SessionRules(True, True))
    assert (method, prefix[0], prefix[-1]) == ("systemd-run", "systemd-run", "--")
    assert sessions.finding(sessions.SessionRules(True, True, True)) is None
    assert sessions.finding(sessions.SessionRules(True, True, False)) is not None


def test_only_allow_listed_variables_are_recorded_and_never_one_named_like_a_secret() -> None:
    variables = {
        "PATH": "/bin",
        "CUDA_HOME": "/cuda\x1b[2J",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "7",
        "AWS_SECRET_ACCESS_KEY": "x",
        "WANDB_API_KEY": "x",
        "PYTHON_KEYRING_BACKEND": "x",
        "CONDA_TOKEN": "x",
        "TORCH_AUTH": "x",
        "MY_VARIABLE": "x",
    }
    recorded = environment.recorded(variables)["variables"]
    assert recorded == {"PATH": "/bin", "CUDA_HOME": "/cuda\\x1b[2J", "NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7"}


def test_a_job_inherits_nothing_of_the_login_that_started_it() -> None:
    variables = {"SSH_AUTH_SOCK": "x", "SSH_CONNECTION": "x", "REMOTE_EVAL_PROGRESS_FD": "3", "LD_LIBRARY_PATH": "/x"}
    kept = environment.for_job(variables)
    assert kept["LD_LIBRARY_PATH"] == "/x"
    assert not [name for name in kept if name.startswith(("SSH_", "REMOTE_EVAL_"))]


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (3, "exit status 3"),
        (-9, "killed by SIGKILL (out of memory?)"),
        (-11, "killed by SIGSEGV"),
        (-99, "killed by signal 99"),
        (None, "it could not be ended, not even by SIGKILL"),
    ],
)
def test_an_exit_is_told_in_words(returncode: int | None, words: str) -> None:
    assert describe_exit(returncode) == words


def test_the_last_line_that_says_something_is_made_harmless() -> None:
    assert last_line(b"Traceback\n\x1b]0;evil\x07ValueError: x\n\n  \n") == "\\x1b]0;evil\\x07ValueError: x"
    assert last_line(b"") == ""
