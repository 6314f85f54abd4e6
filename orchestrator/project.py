"""The project file `remote-eval.yaml`: a team's defaults, found upwards from the current folder."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from pathlib import Path

import pydantic
from pydantic import Field

from orchestrator.errors import ConfigurationError
from orchestrator.layout import PROJECT_FILE_NAME
from orchestrator.yamlfile import load_yaml, validate
from remote_payload.wire import names
from remote_payload.wire.codec import WireError
from remote_payload.wire.plan import BUILTIN_JOBS

ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z")


def check_entry_point(value: str) -> str:
    """Return `module:name`, or raise `ValueError`."""
    if not ENTRY_POINT.match(value):
        raise ValueError("expected `module:name`")
    return value


class ProjectFile(pydantic.BaseModel):
    """What a project may set. Command-line options go before it."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    cluster: str | None = Field(default=None, description="Default for --cluster.")
    config: str | None = Field(default=None, description="Default for --config, relative to this file.")
    adapter: str | None = Field(default=None, description="`module:Class` for reconstruct, found in `code`.")
    code: list[str] = Field(default=[], description="Paths whose git-tracked files are shipped to the node.")
    jobs: dict[str, str] = Field(default={}, description="More jobs: name → `module:function`, found in `code`.")

    @pydantic.field_validator("adapter")
    @classmethod
    def _adapter_is_an_entry_point(cls, value: str | None) -> str | None:
        return check_entry_point(value) if value is not None else None

    @pydantic.field_validator("jobs")
    @classmethod
    def _jobs_are_named_entry_points(cls, value: dict[str, str]) -> dict[str, str]:
        for name, entry in value.items():
            try:
                names.check_job_name(name)
            except WireError as error:
                raise ValueError(str(error)) from None
            if name in BUILTIN_JOBS:
                raise ValueError(f"{name!r} is built in; choose another name")
            check_entry_point(entry)
        return value


@dataclasses.dataclass(frozen=True)
class Project:
    """The project file and the folder it stands in; without one, an empty file in the current folder."""

    folder: Path
    file: ProjectFile
    path: Path | None


def find_project(start: Path) -> Project:
    """Look from `start` up to the repository's root or the home folder, never beyond.

    Raises `ConfigurationError` for a file that is wrong or that somebody else can write.
    """
    folder = start.resolve()
    home = Path.home().resolve()
    while True:
        path = folder / PROJECT_FILE_NAME
        if path.is_file():
            _refuse_if_others_can_write(path)
            document = load_yaml(path)
            return Project(folder, validate(ProjectFile, document.data, document), path)
        is_last = (folder / ".git").exists() or folder == home or folder.parent == folder
        if is_last:
            return Project(start.resolve(), ProjectFile(), None)
        folder = folder.parent


def _refuse_if_others_can_write(path: Path) -> None:
    for place in (path, path.parent):
        status = place.stat()
        others = bool(status.st_mode & stat.S_IWOTH)
        group = bool(status.st_mode & stat.S_IWGRP) and status.st_gid != os.getgid()
        foreign = status.st_uid not in (os.getuid(), 0)
        if others or group or foreign:
            raise ConfigurationError(
                f"{place} can be written by somebody else, so {PROJECT_FILE_NAME} is not trusted: it names code to run",
                action=f"chmod go-w {place}" if not foreign else "Use a copy that belongs to you.",
            )
