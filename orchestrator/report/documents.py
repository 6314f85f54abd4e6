"""What a run folder holds, read once and leniently: the input of results, report and pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.layout import RunLayout
from orchestrator.report import untrusted
from remote_payload.wire import codec, names
from remote_payload.wire.states import AttemptStatus


@dataclasses.dataclass(frozen=True)
class RunDocuments:
    """A run's documents as JSON values; empty where a file is absent. `notes` says what could not be read, and why.

    `jobs` lists the run's jobs in the plan's order; `documents` holds the documents of those that left one.
    """

    run_id: str
    plan: dict[str, Any]
    provenance: dict[str, Any]
    preflight: dict[str, Any]
    status: AttemptStatus | None
    manifest: dict[str, Any]
    jobs: tuple[str, ...]
    documents: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def node_plan(self) -> dict[str, Any]:
        """The part of the plan that the node was given."""
        return untrusted.mapping(self.plan.get("node")) or self.plan

    @property
    def settings(self) -> dict[str, Any]:
        return untrusted.mapping(self.node_plan.get("settings"))


def load_documents(run: RunLayout) -> RunDocuments:
    """Read whatever of a run is here. Never raises for absent or damaged files: they become notes."""
    notes: list[str] = []

    def read(path: Any, label: str) -> dict[str, Any]:
        value, problem = untrusted.read_object(path, label)
        if problem:
            notes.append(problem)
        return value or {}

    plan = read(run.plan, "plan.json")
    status_document = read(run.diagnostics / "status.json", "diagnostics/status.json")
    status = None
    if status_document:
        try:
            status = codec.from_json(AttemptStatus, status_document)
        except codec.WireError as error:
            notes.append(f"diagnostics/status.json is not a truth file: {untrusted.clean(str(error))}")
    jobs = _job_names(plan, status)
    documents = {}
    for job in jobs:
        document = read(run.job_results(job), f"artifacts/{job}/{job}.json")
        if document:
            documents[job] = document
    return RunDocuments(
        run_id=run.run_id,
        plan=plan,
        provenance=read(run.provenance, "provenance.json"),
        preflight=read(run.preflight, "preflight.json"),
        status=status,
        manifest=read(run.manifest, "manifest.json"),
        jobs=jobs,
        documents=documents,
        notes=tuple(notes),
    )


def _job_names(plan: dict[str, Any], status: AttemptStatus | None) -> tuple[str, ...]:
    """The plan's jobs in order, then those that only the truth file knows; names that could be paths are left out."""
    planned: list[str] = []
    for jobs in (plan.get("jobs"), untrusted.mapping(plan.get("node")).get("jobs")):
        for job in jobs if isinstance(jobs, list) else []:
            name = job.get("name") if isinstance(job, dict) else job
            if isinstance(name, str):
                planned.append(name)
    planned.extend(status.jobs if status else ())
    sound: dict[str, None] = {}
    for name in planned:
        try:
            sound[names.check_job_name(name)] = None
        except codec.WireError:
            continue
    return tuple(sound)
