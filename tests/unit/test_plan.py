"""From request to plan: references, jobs, keys."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from orchestrator.errors import CheckpointError, UsageError
from orchestrator.pipeline.early import EARLY_START_BYTES, what_suffices
from orchestrator.plan import (
    CheckpointReference,
    RunPlan,
    SyncedCheckpoint,
    choose_jobs,
    content_key,
    local_checkpoint,
    node_path,
    node_plan,
    parse_reference,
    plan_key,
)
from orchestrator.transfer.order import ChunkClass
from remote_payload.wire.plan import BUILTIN_JOBS, CodeSource, EvaluationSettings, JobSpec


@pytest.mark.parametrize(
    ("text", "exists_here", "expected"),
    [
        ("tensor02:a/b.pt", False, CheckpointReference("a/b.pt", "tensor02")),
        ("tensor02:a b$(x).pt", False, CheckpointReference("a b$(x).pt", "tensor02")),
        ("tensor02:odd", True, CheckpointReference("tensor02:odd")),
        ("./tensor02:odd", False, CheckpointReference("./tensor02:odd")),
        ("runs/best.pt", False, CheckpointReference("runs/best.pt")),
        ("tensor02:with:colon", False, CheckpointReference("with:colon", "tensor02")),
        (":odd", False, CheckpointReference(":odd")),
    ],
)
def test_a_reference_is_local_or_on_a_cluster(text: str, exists_here: bool, expected: CheckpointReference) -> None:
    assert parse_reference(text, exists_here=exists_here) == expected


def test_a_cluster_without_a_path_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_reference("tensor02:", exists_here=False)
    assert "tensor02:PATH" in caught.value.action


def test_a_relative_path_starts_at_the_first_root() -> None:
    assert node_path(CheckpointReference("a.pt", "c"), ["/data", "/more"]) == "/data/a.pt"
    assert node_path(CheckpointReference("/x/a.pt", "c"), ["/data"]) == "/x/a.pt"
    assert node_path(CheckpointReference("a.pt", "c"), []) == "~/a.pt"


def test_an_unknown_job_is_refused_and_a_doubled_one_runs_once() -> None:
    assert choose_jobs(["health", "health"], {}) == (JobSpec("health"),)
    with pytest.raises(UsageError):
        choose_jobs(["helth"], {})
    with pytest.raises(UsageError):
        choose_jobs([], {})


def test_without_a_choice_the_projects_jobs_run_too() -> None:
    assert [job.name for job in choose_jobs(None, {"probe": "m:f"})] == ["health", "reconstruct", "probe"]


def key(**changes: object) -> str:
    values: dict[str, object] = {
        "jobs": (JobSpec("health"),),
        "settings": EvaluationSettings(),
        "code": None,
        "payload_sha256": "0" * 64,
        "gpu_device": "auto",
    }
    return plan_key(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"jobs": (JobSpec("reconstruct"),)},
        {"settings": EvaluationSettings(seed=1)},
        {"code": CodeSource("1" * 64)},
        {"payload_sha256": "1" * 64},
        {"gpu_device": "cpu"},
    ],
)
def test_whatever_decides_the_numbers_changes_the_plan_key(change: dict[str, object]) -> None:
    assert key() != key(**change)


def make_plan() -> RunPlan:
    return RunPlan(
        run_id="r1",
        created_at="2026-01-01T00:00:00+00:00",
        cluster="c",
        profile={"host": "h"},
        checkpoint=CheckpointReference("/a.pt", "c"),
        jobs=(JobSpec("health"),),
        settings=EvaluationSettings(user_config={"a": [1, None, "x"]}),
        payload_sha256="0" * 64,
        plan_key="k",
    )


def test_a_plan_survives_being_written_and_read() -> None:
    assert RunPlan.from_text(make_plan().to_text()) == make_plan()


def test_jobs_that_can_begin_before_the_file_stands_come_first() -> None:
    names = ("mine", "health", "other", "reconstruct")
    jobs = tuple(JobSpec(name, "builtin" if name in BUILTIN_JOBS else "my:job") for name in names)
    synced = SyncedCheckpoint("/a.pt", None, 3, (3, 1, 2), "in_place")
    plan = node_plan(dataclasses.replace(make_plan(), jobs=jobs), synced)
    assert [job.name for job in plan.jobs] == ["reconstruct", "health", "mine", "other"]


def test_a_content_key_from_a_fingerprint_says_that_it_is_not_exact() -> None:
    by_fingerprint = SyncedCheckpoint("/a.pt", None, 3, (3, 1, 2), "in_place")
    by_digest = dataclasses.replace(by_fingerprint, digest="v1:" + "0" * 64)
    assert content_key(make_plan(), by_fingerprint)[1] is False
    assert content_key(make_plan(), by_digest)[1] is True
    changed = dataclasses.replace(by_fingerprint, fingerprint=(3, 9, 2))
    assert content_key(make_plan(), by_fingerprint)[0] != content_key(make_plan(), changed)[0]


def test_a_local_checkpoint_is_a_file_or_a_folder_that_is_there(tmp_path: Path) -> None:
    assert local_checkpoint(CheckpointReference(str(tmp_path))) == tmp_path
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none"):
        with pytest.raises(CheckpointError, match=name):
            local_checkpoint(CheckpointReference(str(tmp_path / name)))


MODEL = EvaluationSettings(adapter="m:A")
RECONSTRUCT, HEALTH, MINE = JobSpec("reconstruct"), JobSpec("health"), JobSpec("mine", "my:job")


@pytest.mark.parametrize(
    ("device", "jobs", "settings", "last"),
    [
        ("auto", (HEALTH,), EvaluationSettings(), ChunkClass.HEADER),
        ("cuda", (HEALTH,), EvaluationSettings(), ChunkClass.HEADER),
        ("auto", (HEALTH,), EvaluationSettings(health_passes=("spectra",)), None),
        ("cuda", (RECONSTRUCT, HEALTH), MODEL, ChunkClass.WEIGHTS),
        ("auto", (RECONSTRUCT, MINE), MODEL, ChunkClass.WEIGHTS),
        ("cuda", (RECONSTRUCT, MINE), MODEL, None),
        ("auto", (MINE,), MODEL, None),
    ],
)
def test_a_run_begins_early_where_that_holds_no_gpu_for_a_job_that_waits(
    device: str, jobs: tuple[JobSpec, ...], settings: EvaluationSettings, last: ChunkClass | None
) -> None:
    profile = {"host": "h", "gpu": {"device": device}}
    plan = dataclasses.replace(make_plan(), jobs=jobs, settings=settings, profile=profile)
    behind = dict.fromkeys(ChunkClass, EARLY_START_BYTES)
    suffices = what_suffices(plan, behind, may_start_early=True)
    assert (suffices[0] if suffices else None) == last
