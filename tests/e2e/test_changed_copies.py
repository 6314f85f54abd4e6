"""A checkpoint of the node's store that somebody wrote to is never evaluated as the one that was sent."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import yaml

from tests.support.world import World

SAID = "the stored copy was changed since it was verified; it is sent again"
SIZE = 9_000_000
JOB = '''


def read(context):
    """What it evaluates: the SHA-256 of every byte."""
    import hashlib

    path, digest = context.plan.checkpoint_path, hashlib.sha256()
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else [""]:
        with open(os.path.join(path, name) if name else path, "rb") as file:
            digest.update(file.read())
    return {"read": digest.hexdigest()}
'''


@pytest.fixture
def run(world: World) -> World:
    jobs = world.project / "my_jobs" / "jobs.py"
    jobs.write_text(jobs.read_text() + JOB)
    (world.project / "remote-eval.yaml").write_text(
        yaml.safe_dump({"cluster": "lab", "code": ["my_jobs"], "jobs": {"read": "my_jobs.jobs:read"}})
    )
    return world


def write_checkpoint(path: Path, kind: str) -> None:
    if kind == "file":
        write_safetensors(path, "w")
        return
    path.mkdir()
    names = {name: f"{name}.safetensors" for name in ("a", "b")}
    for name, file in names.items():
        write_safetensors(path / file, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def write_safetensors(path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(SIZE))


def evaluate(world: World, checkpoint: str) -> tuple[str, str]:
    """What the job read, and what a person was told."""
    done = world.cli("--jobs", "read", "--checkpoint", checkpoint)
    assert done.returncode in (0, 1), done.stderr
    document = world.run_folder(world.run_ids()[-1]) / "artifacts" / "read" / "read.json"
    return json.loads(document.read_text())["read"], done.stdout + done.stderr


def overwrite(path: Path, *, keeps_time: bool) -> None:
    facts = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(facts.st_size // 2)
        file.write(os.urandom(100))
    if keeps_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stored_copy_that_was_written_to_in_place_is_sent_again_and_told_of(run: World, kind: str) -> None:
    write_checkpoint(run.project / "model", kind)
    files = sorted(path for path in [*run.project.glob("model/*"), run.project / "model"] if path.is_file())
    sent = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert evaluate(run, "model")[0] == sent
    found = (run.node / "root of ours" / "checkpoints").glob("*/tree/b.safetensors" if kind == "folder" else "*/file")
    (stored,) = [path for path in found if path.stat().st_size > SIZE]  # the code lies there too
    unchanged = evaluate(run, "model")
    assert unchanged[0] == sent
    assert "0 bytes to send" in unchanged[1]
    for keeps_time in (False, True):
        overwrite(stored, keeps_time=keeps_time)
        read, said = evaluate(run, "model")
        assert read == sent
        assert SAID in said
    stored.chmod(0o440)
    read, said = evaluate(run, "model")
    assert read == sent
    assert "read anew in full, and is what it was" in said
