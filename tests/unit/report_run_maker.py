"""Makes run folders as the collect stage leaves them, for the report's and the history's tests."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from orchestrator.layout import RunLayout

DIMENSIONS = ("integrity", "provenance", "numerics", "training_dynamics", "task_evidence")


def png(width: int = 4, height: int = 3, declared: tuple[int, int] | None = None) -> bytes:
    """A real grey picture; `declared` forges the size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((x * 40 + y * 20) % 256 for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", *(declared or (width, height)), 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wav(samples: int = 80) -> bytes:
    data = bytes(128 for _ in range(samples))
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def finding(identifier: str = "values.nan", severity: str = "error", **over: Any) -> dict[str, Any]:
    return {
        "id": identifier,
        "severity": severity,
        "title": f"{identifier} was found",
        "dimension": "numerics",
        "where": ["encoder.fc1.weight"],
        "evidence": {"count": 3, "first": [0, 7]},
        "explanation": "Because the evidence says so.",
        "confidence": 1.0,
        "refuted_by": "A second reading without it.",
        "action": "Look at it.",
        **over,
    }


def metric(identifier: str = "fmri.voxelwise_correlation", value: float | None = 0.21, **over: Any) -> dict[str, Any]:
    return {
        "id": identifier,
        "version": 1,
        "modality": "fmri",
        "value": value,
        "reason": None if value is not None else "no samples",
        "unit": "r",
        "n": 184,
        "direction": "higher",
        "chance": 0.0,
        "interval": None,
        "baselines": {"train_mean": 0.1},
        "parameters": {"split": "validation"},
        **over,
    }


def document(job: str, dimensions: dict[str, str] | None = None, **over: Any) -> dict[str, Any]:
    given = dict.fromkeys(DIMENSIONS, "not_measured") | (dimensions or {})
    return {
        "schema_version": 1,
        "job": job,
        "findings": [],
        "metrics": [],
        "pictures": [],
        "verdict": {
            "overall": "not_measured",
            "dimensions": given,
            "reasons": {d: f"{job} says {o}" for d, o in given.items()},
        },
        **over,
    }


def plan(run_id: str, job_names: tuple[str, ...], **over: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "created_at": "2026-01-02T03:04:05+00:00",
        "cluster": "tensor02",
        "profile": {"host": "tensor02.example"},
        "checkpoint": {"path": "ckpts/best checkpoint.pt", "cluster": "tensor02"},
        "jobs": [{"name": j, "entry": "builtin"} for j in job_names],
        "settings": {"adapter": "lab:Adapter", "seed": 0, "num_samples": 5, "user_config_text": "token: hunter2"},
        "plan_key": "ab" * 32,
        "config_path": "configs/eval.yaml",
        "config_sha256": "cd" * 32,
        **over,
    }


def status(run_id: str, jobs: dict[str, dict[str, Any]], state: str = "succeeded", **over: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "attempt": 1,
        "nonce": "0" * 32,
        "state": state,
        "supervisor": {"pid": 7, "start_time": "1", "boot_id": "b", "machine_id": "m"},
        "jobs": {name: {"started_at": 10.0, "ended_at": 12.5, **job} for name, job in jobs.items()},
        "started_at": 9.0,
        "ended_at": 13.0,
        **over,
    }


def make_run(
    folder: Path,
    documents: dict[str, dict[str, Any]] | None = None,
    *,
    states: dict[str, dict[str, Any]] | None = None,
    attempt_state: str = "succeeded",
    files: dict[str, bytes] | None = None,
    provenance: dict[str, Any] | None = None,
    plan_over: dict[str, Any] | None = None,
    status_over: dict[str, Any] | None = None,
) -> RunLayout:
    """A run folder whose jobs left `documents`; `states` overrides a job's part of the truth file."""
    run = RunLayout(folder)
    documents = documents or {}
    jobs = tuple(dict.fromkeys([*documents, *(states or {})]))
    run.diagnostics.mkdir(parents=True)
    _write(run.plan, plan(run.run_id, jobs, **(plan_over or {})))
    given = {j: {"state": "succeeded", **(states or {}).get(j, {})} for j in jobs}
    _write(run.diagnostics / "status.json", status(run.run_id, given, attempt_state, **(status_over or {})))
    _write(
        run.provenance,
        {
            "created_at": "2026-01-02T03:04:05+00:00",
            "checkpoint": {"digest": "v1:" + "ef" * 32, "size": 21_000_000_000, "how": "in_place"},
            "stage_seconds": {"preflight": 1.5, "sync": 0.0, "follow": 60.0},
            "bytes_sent": 0,
            **(provenance or {}),
        },
    )
    entries = []
    contents = {f"{j}/{j}.json": json.dumps(d).encode() for j, d in documents.items()} | (files or {})
    for path, data in contents.items():
        target = run.artifact(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        entries.append({"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    _write(run.manifest, {"entries": entries, "complete": True, "schema": 1})
    return run


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
