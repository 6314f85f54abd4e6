"""GPUs are chosen with care: told by an `nvidia-smi` that answers what a real one does, or nothing at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agent_node import AgentNode, Attempt, agent_node, interpreter_name, interpreters

SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) cat <<'END'
0, GPU-aaaaaaaa-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559, 81079, 550.54.15
1, GPU-bbbbbbbb-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559, 80000, 550.54.15
2, GPU-cccccccc-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559, 60000, 550.54.15
3, GPU-dddddddd-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 81559, 100, 550.54.15
END
;;
--query-compute-apps=*) echo "GPU-aaaaaaaa-0000-0000-0000-000000000000, 4242";;
esac
"""

TELLS_ITS_GPUS = """
import os, time
from remote_payload.wire.states import Phase
def run(context):
    (context.artifacts / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    context.progress(Phase.RUN)
    while not (context.artifacts.parents[2] / "go").exists(): time.sleep(0.05)
"""


@pytest.fixture(params=interpreters(), ids=interpreter_name)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentNode]:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(SMI)
    (tools / "nvidia-smi").chmod(0o755)
    with agent_node(tmp_path, request.param, {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}) as made:
        made.environment.pop("CUDA_VISIBLE_DEVICES", None)
        yield made


def let_go(node: AgentNode, run_id: str) -> None:
    (Path(node.layout.run_folder(run_id)) / "go").touch()


def test_runs_side_by_side_take_different_free_gpus_and_the_third_finds_none(node: AgentNode) -> None:
    gpu = {"device": "cuda", "count": 1}
    first = node.start(TELLS_ITS_GPUS, gpu=gpu)
    first.wait_for_phase("run")
    second = node.start(TELLS_ITS_GPUS, gpu=gpu)
    second.wait_for_phase("run")
    third = node.start(TELLS_ITS_GPUS, gpu=gpu)
    refused = third.wait_for_end()
    assert first.artifact("work/gpus").read_text().startswith("GPU-bbbbbbbb")
    assert second.artifact("work/gpus").read_text().startswith("GPU-cccccccc")
    assert refused["state"] == "failed"
    assert refused["jobs"]["work"]["state"] == "not_run"
    for reason in ("GPU 0: 1 other process", "GPU 1: leased by another run", "GPU 3: 0.1 GiB free"):
        assert reason in refused["cause"]
    let_go(node, first.run_id)
    assert first.wait_for_end()["state"] == "succeeded"
    fourth = node.start(TELLS_ITS_GPUS, gpu=gpu)
    fourth.wait_for_phase("run")
    assert fourth.artifact("work/gpus").read_text().startswith("GPU-bbbbbbbb")


def test_a_run_that_asks_for_no_gpu_sees_none(node: AgentNode) -> None:
    attempt = node.start(TELLS_ITS_GPUS, gpu={"device": "cpu"})
    attempt.wait_for_phase("run")
    assert attempt.artifact("work/gpus").read_text() == ""


def test_auto_uses_the_cpu_where_every_gpu_is_taken_and_says_why(node: AgentNode) -> None:
    attempt = node.start(TELLS_ITS_GPUS, gpu={"device": "auto", "min_free_bytes": 10**15})
    attempt.wait_for_phase("run")
    assert attempt.artifact("work/gpus").read_text() == ""
    assert "GiB free of the" in attempt.event("gpus_chosen")["reason"]


def test_a_schedulers_allocation_is_never_left(node: AgentNode) -> None:
    node.environment["CUDA_VISIBLE_DEVICES"] = "2,3"
    attempt = node.start(TELLS_ITS_GPUS, gpu={"device": "cuda", "count": 1})
    attempt.wait_for_phase("run")
    assert attempt.artifact("work/gpus").read_text().startswith("GPU-cccccccc")


def test_preflight_names_what_keeps_the_gpus_from_being_taken(node: AgentNode) -> None:
    found = node.call("preflight", gpu_policy="cuda")
    assert [(gpu["index"], gpu["foreign_processes"]) for gpu in found["gpus"]] == [(0, 1), (1, 0), (2, 0), (3, 0)]
    assert found["driver_version"] == "550.54.15"
    assert "node.gpu_busy" not in [finding["id"] for finding in found["findings"]]
    node.environment["CUDA_VISIBLE_DEVICES"] = "0,3"
    busy = next(f for f in node.call("preflight", gpu_policy="cuda")["findings"] if f["id"] == "node.gpu_busy")
    assert busy["severity"] == "error"
    assert busy["evidence"] == {"gpu_0": "1 other process", "gpu_3": "0.1 GiB free of the 2.0 GiB wanted"}


def arriving(node: AgentNode) -> Path:
    """Where a checkpoint will stand of which only a part is there, and nothing of that to be read."""
    digest = "v1:" + "c" * 64
    part = Path(node.layout.checkpoint_part(digest))
    part.parent.mkdir(parents=True)
    with part.open("wb") as file:
        file.truncate(1 << 20)
    spans = {"part_inode": part.stat().st_ino, "size": 1 << 20, "spans": []}
    Path(node.layout.checkpoint_readable(digest)).write_text(json.dumps(spans) + "\n")
    return Path(node.layout.checkpoint(digest))


def message_of(attempt: Attempt, job: str) -> str:
    return str(attempt.truth()["jobs"].get(job, {}).get("message")) if Path(attempt.layout.status).exists() else ""


HEALTH = {"name": "health"}
USERS = {"name": "work", "entry": "work:run"}


@pytest.mark.parametrize(
    ("jobs", "waiting", "state"),
    [([HEALTH], "health", "running"), ([USERS], "work", "pending"), ([HEALTH, USERS], "health", "running")],
)
def test_no_gpu_is_leased_while_a_run_waits_for_the_bytes_of_its_checkpoint(
    node: AgentNode, jobs: list[dict[str, str]], waiting: str, state: str
) -> None:
    gpu = {"device": "cuda", "count": 1}
    plan = node.plan("run-waits", {"work.py": TELLS_ITS_GPUS}, {}, gpu=gpu, checkpoint_path=str(arriving(node)))
    waits = node.claim({**plan, "jobs": jobs})
    waits.launch()
    waits.wait_for("a wait for the rest", lambda: "waiting for the rest" in message_of(waits, waiting))
    assert waits.truth()["jobs"][waiting]["state"] == state
    other = node.start(TELLS_ITS_GPUS, gpu=gpu)
    other.wait_for_phase("run")
    assert other.artifact("work/gpus").read_text().startswith("GPU-bbbbbbbb")
    waits.cancel()
    assert waits.wait_for_end()["state"] == "cancelled"


def test_a_job_that_waited_for_the_rest_gets_its_gpu_when_that_has_come(node: AgentNode) -> None:
    path = arriving(node)
    plan = {"gpu": {"device": "cuda", "count": 1}, "checkpoint_path": str(path)}
    attempt = node.start(TELLS_ITS_GPUS, **plan)
    attempt.wait_for("a wait for the rest", lambda: "waiting for the rest" in message_of(attempt, "work"))
    path.with_name("file.part").rename(path)
    attempt.wait_for_phase("run")
    assert attempt.artifact("work/gpus").read_text().startswith("GPU-bbbbbbbb")


def test_a_gpu_that_another_took_meanwhile_is_told_and_what_was_done_is_listed(node: AgentNode) -> None:
    path = arriving(node)
    gpu = {"device": "cuda", "count": 3, "allow_shared": True, "min_free_bytes": 2**30}
    waits = node.start(TELLS_ITS_GPUS, gpu=gpu, checkpoint_path=str(path))
    waits.wait_for("a wait for the rest", lambda: "waiting for the rest" in message_of(waits, "work"))
    node.start(TELLS_ITS_GPUS, gpu={"device": "cuda", "count": 1}).wait_for_phase("run")
    path.with_name("file.part").rename(path)
    ended = waits.wait_for_end()
    assert (ended["state"], ended["jobs"]["work"]["state"]) == ("failed", "not_run")
    assert "GPU 1: leased by another run" in ended["cause"]
    assert Path(waits.layout.manifest).exists()
