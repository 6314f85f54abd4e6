"""The payload's compiled twin: made once, used from then on, and done without where it is missing or damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload
from remote_payload.agent.bytecode import compile_archive, compiled_path, source_archive
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.layout import NodeLayout


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The payload where a node has it."""
    layout = NodeLayout(str(tmp_path / "root"))
    built = build_payload(LocalLayout(tmp_path / "d", tmp_path / "c", tmp_path / "k"))
    path = Path(layout.payload(built.sha256))
    path.parent.mkdir(parents=True)
    path.parent.parent.chmod(0o700)
    path.write_bytes(built.path.read_bytes())
    return path


def run(archive: Path, *options: str) -> tuple[dict[str, Any], str]:
    """(the reply to `hello`, what Python said on standard error)."""
    nonce, root = "ab" * 16, str(archive.parent.parent)
    request = {"verb": "hello", "nonce": nonce, "protocol": PROTOCOL_VERSION, "params": {"root": root}}
    done = subprocess.run(
        [sys.executable, *options, str(archive), "agent", "call", "-"],
        input=frames.encode_request(request).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    reply = frames.decode_reply(nonce, done.stdout)[1]
    assert "ok" in reply, json.dumps(reply)
    return reply["ok"], done.stderr.decode()


def test_the_first_hello_makes_the_compiled_twin_and_the_next_imports_from_it(archive: Path) -> None:
    twin = Path(compiled_path(str(archive)))
    first, _ = run(archive)
    assert twin.stat().st_mode & 0o077 == 0
    second, said = run(archive, "-v")
    assert f"import 'remote_payload.agent.hello' # <zipimporter object \"{twin}" in said
    assert first["payload_sha256"] == second["payload_sha256"] == archive.stem
    assert [path.name for path in archive.parent.iterdir() if path.name.startswith(".")] == []


def test_the_twin_holds_every_module_as_source_and_the_agents_as_bytecode(archive: Path) -> None:
    assert compile_archive(str(archive), str(archive.parent))
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(compiled_path(str(archive))) as twin:
        assert set(source.namelist()) <= set(twin.namelist())
        extra = set(twin.namelist()) - set(source.namelist())
    assert {"remote_payload/agent/receive.pyc", "remote_payload/wire/stream.pyc"} <= extra
    assert all(name.startswith("remote_payload/") and name.endswith(".pyc") for name in extra)


def test_bytecode_is_what_runs_not_the_source_beside_it(archive: Path) -> None:
    run(archive)
    twin = Path(compiled_path(str(archive)))
    with zipfile.ZipFile(twin) as made:
        members = {name: made.read(name) for name in made.namelist()}
    with zipfile.ZipFile(twin, "w") as other:
        for name, data in members.items():
            has_bytecode = name + "c" in members
            other.writestr(name, b"raise SystemExit('the source was compiled')" if has_bytecode else data)
    assert run(archive)[0]["payload_sha256"] == archive.stem


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(10), b"PK\x05\x06" + bytes(18)])
def test_a_twin_that_is_no_archive_is_passed_over(archive: Path, content: bytes) -> None:
    Path(compiled_path(str(archive))).write_bytes(content)
    assert run(archive)[0]["payload_sha256"] == archive.stem


def test_an_archive_elsewhere_than_among_the_nodes_payloads_gets_no_twin(archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "by-hand.pyz"
    os.link(archive, other)
    assert not compile_archive(str(other), str(archive.parent))
    assert not Path(compiled_path(str(other))).exists()


def test_the_twins_path_leads_back_to_the_archive(archive: Path) -> None:
    assert source_archive(compiled_path(str(archive))) == str(archive)
    assert source_archive(str(archive)) == str(archive)
