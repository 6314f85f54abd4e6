"""Runs and stored files of any age under a node root, as they would stand there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from remote_payload.wire.layout import NodeLayout

DAY_S = 86_400


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    for found in [*path.rglob("*"), path]:
        os.utime(found, (then, then), follow_symlinks=False)


def make_run(node: NodeLayout, run_id: str, days: float, checkpoint: str, state: str | None = "succeeded") -> Path:
    attempt = node.attempt(run_id, 1)
    Path(attempt.folder).mkdir(parents=True)
    plan = {
        "run_id": run_id,
        "payload_sha256": "1" * 64,
        "jobs": [],
        "checkpoint_path": node.checkpoint(checkpoint),
        "checkpoint_digest": checkpoint,
        "settings": {},
        "gpu": {},
        "overrun": {},
    }
    Path(node.plan(run_id)).write_text(json.dumps(plan))
    Path(attempt.claim).write_text(json.dumps({"nonce": "0" * 32, "client": "c", "machine_id": "m"}))
    if state is not None:
        me = {"pid": 1, "start_time": "0", "boot_id": "b", "machine_id": "elsewhere"}
        Path(attempt.decision).write_text(json.dumps({"decision": "started", "supervisor": me}))
        status = {"run_id": run_id, "attempt": 1, "nonce": "0" * 32, "state": state, "supervisor": me, "jobs": {}}
        Path(attempt.status).write_text(json.dumps(status))
    age(Path(node.run_folder(run_id)), days)
    return Path(node.run_folder(run_id))


def store_file(node: NodeLayout, letter: str, days: float, size: int = 100_000) -> str:
    digest = "v1:" + letter * 64
    folder = Path(node.checkpoint_folder(digest))
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * size)
    age(folder, days)
    return digest
