"""What is told of an adapter from its source alone, and the one that `adapter new` makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.adapters import KINDS, AdapterSource, check_source, find_source, scaffold
from orchestrator.adapters.source import protocol_methods
from orchestrator.doctor import Check, CheckState
from orchestrator.project import find_project
from remote_payload.reconstruct.protocol import Adapter

GOOD = """
from remote_payload.reconstruct.protocol import AdapterBase

class Mine(AdapterBase):
    data_names = ("images",)

    def build_model(self, config): ...
    def modalities(self, data, config): ...
    def samples(self, split, data, config): ...
    def predict(self, model, batch): ...
"""


def checks(text: str, *data: str, class_name: str = "Mine") -> dict[str, Check]:
    source = AdapterSource(f"a:{class_name}", class_name, Path("a.py"), text)
    return {check.name: check for check in check_source(source, data or ("images",))}


def errors(text: str, *data: str, class_name: str = "Mine") -> list[str]:
    found = checks(text, *data, class_name=class_name).values()
    return [check.message for check in found if check.state is CheckState.ERROR]


def test_a_good_adapter_passes_every_check() -> None:
    found = checks(GOOD)
    assert list(found) == ["file", "syntax", "class", "methods", "signatures", "data"]
    assert {check.state for check in found.values()} == {CheckState.OK}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Mine", "class Yours", "no class Mine; there are Yours"),
        ("def predict(self, model, batch)", "def forward(self, model, batch)", "Mine has no predict"),
        ("def samples(self, split, data, config)", "def samples(self, split)", "is called with split, data, config"),
        ("def build_model(self, config)", "def build_model(self, config, width)", "is called with config"),
        ("def predict(self, model, batch)", "async def predict(self, model, batch)", "asynchronous"),
        ("def predict(self, model, batch)", "def predict(self, model, batch, *, beam)", "needs the keyword beam"),
        ('("images",)', '("images", "labels")', "lacks labels"),
        ('("images",)', '"images"', "not a tuple"),
        ("def build_model(self, config): ...", "def build_model(self, config: ...", "a.py:"),
        ("data_names", "def __init__(self, path): ...\n    data_names", "made without any"),
        ("(AdapterBase)", "", "does not subclass AdapterBase"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, words: str) -> None:
    assert old in GOOD
    (message, *_) = errors(GOOD.replace(old, new))
    assert words in message


@pytest.mark.parametrize(
    "signature",
    [
        "def samples(self, *arguments)",
        "def samples(self, split, data, config, more=None)",
        "def samples(self, /, split, data, config, *, fast=False)",
        "def samples(self, split, *rest, **named)",
        "@staticmethod\n    def samples(split, data, config)",
    ],
)
def test_what_can_be_called_is_well(signature: str) -> None:
    assert errors(GOOD.replace("def samples(self, split, data, config)", signature)) == []


def test_what_source_cannot_tell_is_left_to_the_node() -> None:
    found = checks("from elsewhere import Mine\n")
    assert found["class"].state is CheckState.WARNING
    assert errors(GOOD.replace("AdapterBase", "OurOwnBase")) == []
    assert checks(GOOD.replace('("images",)', "names()"))["data"].state is CheckState.WARNING


@pytest.mark.parametrize("text", ["\0", "(" * 5000, "class Mine: " + "-" * 100_000 + "1", "def f(:\n"])
def test_a_hostile_source_is_an_error_and_no_crash(text: str) -> None:
    assert errors(text)


def test_nothing_of_the_source_is_run(tmp_path: Path) -> None:
    checks(f"open({str(tmp_path / 'ran')!r}, 'w')\n{GOOD}")
    assert not (tmp_path / "ran").exists()


def test_the_protocols_methods_are_read_from_its_source() -> None:
    methods = protocol_methods()
    assert methods["samples"] == ["split", "data", "config"]
    assert set(methods) == {n for n, v in vars(Adapter).items() if callable(v) and not n.startswith("_")}


def test_an_adapter_that_is_not_shipped_is_refused(tmp_path: Path) -> None:
    (tmp_path / "remote-eval.yaml").write_text("adapter: mine.adapter:Mine\ncode: [other]\n")
    (tmp_path / "mine").mkdir()
    project = find_project(tmp_path)
    missing = find_source("mine.adapter:Mine", project)
    assert isinstance(missing, Check)
    assert "mine/adapter.py" in missing.message
    (tmp_path / "mine" / "adapter.py").write_text(GOOD)
    unshipped = find_source("mine.adapter:Mine", project)
    assert isinstance(unshipped, Check)
    assert "not among the code that is shipped (other)" in unshipped.message
    (tmp_path / "remote-eval.yaml").write_text("adapter: mine.adapter:Mine\ncode: [mine]\n")
    found = find_source("mine.adapter:Mine", find_project(tmp_path))
    assert isinstance(found, AdapterSource)


def test_a_source_of_gigabytes_is_refused_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "remote-eval.yaml").write_text("adapter: mine:Mine\ncode: [mine.py]\n")
    with (tmp_path / "mine.py").open("wb") as file:
        file.truncate(1 << 40)
    found = find_source("mine:Mine", find_project(tmp_path))
    assert isinstance(found, Check)
    assert "is larger than" in found.message


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_first_adapter_of_every_kind_is_well_and_well_written(kind: str, tmp_path: Path) -> None:
    text = scaffold(kind, "Mine")
    assert errors(text, KINDS[kind].name) == []
    path = tmp_path / "adapter.py"
    path.write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--select", "E,F,W,I,B,UP", "--line-length", "120"]
    for command in (
        [*ruff, "check", *rules, str(path)],
        [*ruff, "format", "--check", "--line-length", "120", str(path)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["", "two words", "1st", "a.b", "x\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a class"):
        scaffold("image", name)
