"""nightly.yaml: what to evaluate whenever its checkpoint is new."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import Field

from orchestrator.errors import CheckpointError
from orchestrator.yamlfile import load_yaml, validate

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Target(pydantic.BaseModel):
    """One checkpoint to watch. What is left out, the project file says."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=_NAME, description="What the summary calls it; unique in the file.")
    checkpoint: str = Field(
        min_length=1,
        description="Local path or CLUSTER:path. With *, ? or [ in it: the file changed last among those that match.",
    )
    cluster: str | None = Field(default=None, min_length=1, description="Cluster to evaluate on.")
    config: str | None = Field(
        default=None, min_length=1, description="Config file, from the project folder if relative."
    )
    jobs: list[str] | None = Field(default=None, min_length=1, description="Jobs to run; default: all.")
    num_samples: Annotated[int, Field(ge=0, le=1000)] | None = Field(default=None, description="How many pictures.")
    project: str | None = Field(
        default=None, min_length=1, description="Folder whose remote-eval.yaml holds; default: that of nightly.yaml."
    )

    @property
    def definition_key(self) -> str:
        """Digest of everything but the name: an edited target is evaluated anew."""
        text = json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class NightlyFile(pydantic.BaseModel):
    """The whole file."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    targets: list[Target] = Field(min_length=1, description="What to watch, in the order it is visited.")

    @pydantic.field_validator("targets")
    @classmethod
    def _names_differ(cls, targets: list[Target]) -> list[Target]:
        names = [t.name for t in targets]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two targets are named {twice[0]!r}")
        return targets


def load_targets(path: Path) -> NightlyFile:
    """Read nightly.yaml; `project` becomes absolute. Raises `ConfigurationError` with file, line and field."""
    document = load_yaml(path)
    file = validate(NightlyFile, document.data, document)
    folder = path.absolute().parent
    placed = [
        target.model_copy(update={"project": str(folder / Path(target.project or ".").expanduser())})
        for target in file.targets
    ]
    return NightlyFile(targets=placed)


def is_pattern(reference: str) -> bool:
    """Whether a checkpoint reference names many files."""
    return any(character in reference for character in "*?[")


def newest_match(pattern: str, folder: Path) -> Path:
    """The file changed last among those here that match, the last by name among equals. Raises `CheckpointError`."""
    wanted = Path(pattern).expanduser()
    files = [Path(p) for p in glob.glob(str(folder / wanted), recursive=True)]  # noqa: PTH207 - absolute patterns too
    candidates = [(p.stat().st_mtime_ns, str(p)) for p in files if p.is_file()]
    if not candidates:
        raise CheckpointError(f"no file matches {pattern}", action="Check the target's checkpoint in nightly.yaml.")
    return Path(max(candidates)[1])
