"""Healthy files that transformers itself wrote of models that were really trained: no warning, no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from remote_payload.checkpoint import read_header
from tests.support.health_plants import examined
from tests.support.library_runs import TRANSFORMERS, trained_files

STEPS = 40


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16 over float32 weights"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_healthy_run_of_transformers_gets_no_warning_and_no_error(tmp_path: Path, name: str, mixed: bool) -> None:
    for kind, path, names in trained_files(name, tmp_path, mixed, STEPS):
        document = examined(path)
        loud = [(f["id"], f["title"], f["where"]) for f in document["findings"] if f["severity"] != "info"]
        assert loud == [], kind
        assert document["verdict"]["dimensions"]["integrity"] == "pass", kind
        assert document["verdict"]["dimensions"]["numerics"] == "pass", kind
        if names:
            optimizer = read_header(str(path)).optimizer
            assert optimizer is not None
            assert optimizer.parameters == {str(i): n for i, n in enumerate(names)}
            assert document["joint"].keys() == set(names)
            assert document["verdict"]["dimensions"]["training_dynamics"] == "pass"
