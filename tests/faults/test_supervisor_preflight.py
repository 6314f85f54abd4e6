"""Preflight on nodes whose torch hangs, dies, lies about its version or is not there. Stand-in torch packages, real
processes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agent_node import AgentNode, agent_node, interpreter_name, interpreters

WithTorch = Callable[[str], AgentNode]

USABLE = """
__version__ = "2.6.0+cu124"
class version: cuda = "12.4"
class cuda:
    @staticmethod
    def is_available(): return False
"""


@pytest.fixture(params=interpreters(), ids=interpreter_name)
def with_torch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WithTorch]:
    packages = tmp_path / "packages"
    (packages / "torch").mkdir(parents=True)
    with agent_node(tmp_path, request.param, {"PYTHONPATH": str(packages)}) as node:

        def install(source: str) -> AgentNode:
            (packages / "torch" / "__init__.py").write_text(source)
            return node

        yield install


def finding(found: Any, wanted: str) -> Any:
    return next(f for f in found["findings"] if f["id"] == wanted)


def test_a_torch_that_hangs_is_an_error_with_the_stacks_that_show_where(with_torch: WithTorch) -> None:
    node = with_torch(
        "import subprocess, sys, threading\n"
        "def waits_for_a_stale_lock(): threading.Event().wait()\n"
        "waits_for_a_stale_lock()\n"
    )
    found = node.call("preflight", timeout_s=8.0)
    hang = finding(found, "node.torch_import_hangs")
    assert hang["severity"] == "error"
    assert "waits_for_a_stale_lock" in hang["evidence"]["stacks"]
    assert hang["evidence"]["phase"] == "torch"
    assert found["free_bytes"] > 0
    assert "disk" in found["seconds"]


def test_a_torch_that_kills_the_process_is_an_error_with_its_last_words(with_torch: WithTorch) -> None:
    node = with_torch("import os, sys\nprint('undefined symbol', file=sys.stderr, flush=True)\nos.abort()\n")
    died = finding(node.call("preflight"), "node.torch_import_fails")
    assert "SIGABRT" in died["title"]
    assert "undefined symbol" in died["evidence"]["stderr"]


@pytest.mark.parametrize(
    ("source", "wanted", "severity"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "node.torch_import_fails", "error"),
        (USABLE.replace("2.6.0", "2.1.2"), "node.torch_too_old", "error"),
        ("print('x' * 10_000_000, flush=True)\n" + USABLE, "node.no_gpu", "error"),
    ],
)
def test_each_unfit_torch_has_its_finding(with_torch: WithTorch, source: str, wanted: str, severity: str) -> None:
    found = with_torch(source).call("preflight", gpu_policy="cuda")
    assert finding(found, wanted)["severity"] == severity


def test_a_usable_torch_is_told_with_its_versions(with_torch: WithTorch) -> None:
    found = with_torch(USABLE).call("preflight", gpu_policy="cpu")
    assert (found["torch_version"], found["cuda_version"]) == ("2.6.0+cu124", "12.4")
    assert [f["id"] for f in found["findings"] if f["severity"] == "error"] == []
    assert list(found["seconds"]) == ["disk", "gpus", "torch", "cuda"]


def test_a_node_without_torch_is_unfit_for_our_jobs_and_not_for_a_users_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with agent_node(tmp_path, str(tmp_path / "bare" / "bin" / "python"), {"PYTHONNOUSERSITE": "1"}) as node:
        missing = finding(node.call("preflight"), "node.torch_missing")
        assert missing["severity"] == "error"
        plan = node.plan("own", {"work.py": ""}, {"work": "work:run"})
        found = node.call("preflight", plan=plan)
        assert finding(found, "node.torch_missing")["severity"] == "warning"
        assert finding(found, "checkpoint.missing")["severity"] == "error"


def test_too_little_space_for_a_file_that_the_node_may_have_already_is_a_warning(with_torch: WithTorch) -> None:
    found = with_torch(USABLE).call("preflight", gpu_policy="cpu", needed_bytes=10**18)
    low = finding(found, "node.low_disk")
    assert low["severity"] == "warning"
    assert low["evidence"]["needed_bytes"] == 10**18


def test_a_checkpoint_that_was_replaced_since_it_was_planned_is_found(with_torch: WithTorch, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"not a checkpoint")
    node = with_torch(USABLE)
    plan = node.plan(
        "swapped",
        {"work.py": ""},
        {"work": "work:run"},
        checkpoint_path=str(checkpoint),
        checkpoint_fingerprint=[16, 1, 1],
    )
    found = node.call("preflight", plan=plan)
    assert finding(found, "integrity.changed_since_planned")["severity"] == "error"
    assert finding(found, "checkpoint.not_a_checkpoint")["severity"] == "error"
