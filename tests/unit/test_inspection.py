"""A checkpoint's header is read by a process of its own, once for as long as the file stays the same."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from orchestrator import inspection
from orchestrator.cli.output import ConsoleReporter
from orchestrator.errors import CheckpointError
from orchestrator.inspection import inspect_ahead, inspect_local
from orchestrator.layout import LocalLayout
from orchestrator.pipeline.resolve import Request, draft
from orchestrator.pipeline.world import make_services


def write(path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def tensor_names(path: Path) -> list[str]:
    return [tensor["name"] for tensor in inspect_local(path)["header"]["tensors"]]


def test_a_file_that_stays_the_same_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, "first")
    inspect_ahead(path)
    assert inspect_local(path)["header"] is inspect_local(path)["header"]


def test_a_file_that_was_written_anew_is_read_anew_though_size_and_time_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, "first")
    facts = path.stat()
    assert tensor_names(path) == ["first"]
    write(path, "other")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    assert tensor_names(path) == ["other"]


def test_who_asked_ahead_hears_what_is_wrong_when_it_asks_again(tmp_path: Path) -> None:
    for name in ("missing.pt", "text.pt"):
        path = tmp_path / name
        if name == "text.pt":
            path.write_text("no checkpoint")
        inspect_ahead(path)
        with pytest.raises(CheckpointError):
            inspect_local(path)


def test_while_a_run_is_planned_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, "first")
    layout = LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")
    services = make_services(layout, ConsoleReporter(quiet=True), lambda *_: None)
    before = inspection._remembered.cache_info().misses
    draft(Request("local", str(path), start_folder=tmp_path), services)
    for thread in threading.enumerate():
        if thread.name == "inspect":
            thread.join(60)
    assert inspection._remembered.cache_info().misses == before + 1
