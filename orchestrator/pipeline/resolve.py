"""resolve: profile + request + project file → a `RunPlan`, journalled."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from orchestrator.config import load_config
from orchestrator.errors import ConfigurationError, UsageError
from orchestrator.fsutil import write_atomically
from orchestrator.inspection import inspect_ahead
from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload
from orchestrator.pipeline.context import Services
from orchestrator.plan import (
    CheckpointReference,
    RunPlan,
    choose_jobs,
    local_checkpoint,
    new_run_id,
    parse_reference,
    plan_key,
)
from orchestrator.profiles import NamedProfile, load_profile
from orchestrator.project import Project, find_project
from orchestrator.transfer.archive import pack_code
from orchestrator.transfer.local_folder import read_folder_fingerprint
from remote_payload.wire.plan import CodeSource

DEFAULT_NUM_SAMPLES = 4
MAX_NUM_SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Request:
    """What the person asked for; None leaves it to the project file."""

    cluster: str | None
    checkpoint: str
    config: Path | None = None
    num_samples: int = DEFAULT_NUM_SAMPLES
    jobs: list[str] | None = None
    start_folder: Path = Path()
    nightly_target: str | None = None


def resolve(request: Request, services: Services) -> RunPlan:
    """Fix what will be done, write it to the run's folder and journal it. Raises `UsageError` and its kin."""
    plan = draft(request, services)
    run = services.layout.run(plan.run_id)
    services.layout.make_private(run.folder)
    write_atomically(run.plan, plan.to_text().encode())
    services.journal.append(plan.run_id, "planned", cluster=plan.cluster, checkpoint=str(plan.checkpoint))
    return plan


def draft(request: Request, services: Services) -> RunPlan:
    """What would be done; nothing is written of it. Raises as `resolve` does."""
    if not 0 <= request.num_samples <= MAX_NUM_SAMPLES:
        raise UsageError(f"--num-samples must be 0 to {MAX_NUM_SAMPLES}", action="It counts pictures only.")
    project = find_project(request.start_folder)
    named = resolve_profile(request.cluster, project, services.layout)
    reference = resolve_reference(request.checkpoint)
    if reference.cluster is None:
        inspect_ahead(Path(reference.path))
    is_elsewhere = reference.cluster not in (None, named.name)
    source = resolve_profile(reference.cluster, project, services.layout) if is_elsewhere else None
    jobs = choose_jobs(request.jobs, project.file.jobs)
    config_path = request.config or (project.folder / project.file.config if project.file.config else None)
    config = load_config(
        config_path,
        num_samples=request.num_samples,
        adapter=project.file.adapter,
        variables=named.profile.variables,
        data_base=config_path.absolute().parent if named.profile.embedded and config_path else None,
    )
    payload = build_payload(services.layout)
    code = _pack(project, services)
    needs_code = any(job.entry != "builtin" for job in jobs)
    if needs_code and code is None:
        raise ConfigurationError(
            f"{project.path}: `jobs` names code, and `code` names no path to ship",
            action="List the paths that hold the jobs under `code:`.",
        )
    return RunPlan(
        run_id=new_run_id(datetime.datetime.now(datetime.timezone.utc)),
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        cluster=named.name,
        profile=named.profile.model_dump(mode="json", by_alias=True),
        source_profile=source.profile.model_dump(mode="json", by_alias=True) if source else None,
        checkpoint=reference,
        jobs=jobs,
        settings=config.settings,
        payload_sha256=payload.sha256,
        plan_key=plan_key(
            jobs=jobs,
            settings=config.settings,
            code=code,
            payload_sha256=payload.sha256,
            gpu_device=named.profile.gpu.device,
        ),
        config_path=str(config_path.absolute()) if config_path else None,
        config_sha256=config.file_sha256,
        project_folder=str(project.folder) if project.path else None,
        code_paths=tuple(project.file.code),
        code=code,
        nightly_target=request.nightly_target,
        local_fingerprint=fingerprint(Path(reference.path)) if reference.cluster is None else (),
    )


def resolve_profile(cluster: str | None, project: Project, layout: LocalLayout) -> NamedProfile:
    """The profile that was asked for or that the project names."""
    name = cluster or project.file.cluster
    if name is None:
        raise UsageError(
            "no cluster was named",
            action="Give --cluster NAME (`remote-eval clusters` lists them), or set `cluster:` in remote-eval.yaml.",
        )
    return load_profile(name, layout, project.folder)


def resolve_reference(text: str) -> CheckpointReference:
    """The checkpoint reference; a local one is made absolute and must be a regular file or a folder."""
    reference = parse_reference(text, exists_here=Path(text).expanduser().exists())
    if reference.cluster is None:
        return CheckpointReference(str(local_checkpoint(reference)))
    return reference


def fingerprint(path: Path) -> tuple[int, int, int]:
    """Size in bytes, mtime in nanoseconds and inode of a local file, or what stands for these of a folder: a hint that
    it is the same, never proof."""
    if path.is_dir():
        found = read_folder_fingerprint(path)
        return found.size, found.mtime_ns, found.inode
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _pack(project: Project, services: Services) -> CodeSource | None:
    if not project.file.code:
        return None
    archive = pack_code(project.folder, list(project.file.code), services.layout)
    if archive.untracked:
        names = ", ".join(archive.untracked[:5]) + (", …" if len(archive.untracked) > 5 else "")
        services.reporter.warn(f"not shipped, since git does not track them: {names}")
    return CodeSource(archive.sha256, archive.git_sha, archive.dirty)
