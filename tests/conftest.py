"""Fixtures of tests that run the whole job: one sshd a worker, one world a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sshd import Sshd, running_sshd
from tests.support.world import World, make_world

# As installed programs do, those that tests start find bytecode of themselves, even where a shell says to write none.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Before torch and numpy: with workers beside each other, threads of one spin while they wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imported here: most tests need no torch, and it takes seconds to import.
    import torch

    from tests.support.checkpoints import trained_small_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    torch.save(trained_small_checkpoint(), path)
    return path


@pytest.fixture(scope="session")
def e2e_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture(scope="session")
def torchless_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without torch, for jobs of the project's own: its preflight takes no seconds to import anything."""
    folder = tmp_path_factory.mktemp("python") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    return str(folder / "bin" / "python")


@pytest.fixture
def world(tmp_path: Path, e2e_sshd: Sshd, small_checkpoint: Path, torchless_python: str) -> World:
    """For jobs of the project's own; `world.with_torch()` for the built-in ones."""
    return make_world(tmp_path, e2e_sshd, small_checkpoint, torchless_python)
