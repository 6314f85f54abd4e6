"""A run's config: a validated `remote_eval:` section, or the user's own file, which reaches the adapter untouched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from orchestrator.errors import ConfigurationError
from orchestrator.project import check_entry_point
from orchestrator.yamlfile import load_yaml, validate
from remote_payload.wire.plan import EvaluationSettings

SECTION = "remote_eval"
MAX_USER_CONFIG_BYTES = 1024 * 1024
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class FeatureSection(pydantic.BaseModel):
    """A pretrained network on the node, as TorchScript, in whose features images are compared."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="TorchScript file on the node; ${NAME}: the profile's variables.")
    layers: tuple[str, ...] = Field(default=(), description="Keys of the dict that it gives; default: all.")
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="Height and width in pixels that images are resized to; default: as they are."
    )
    mean: tuple[float, ...] = Field(default=(0.0,), min_length=1, description="Taken from each channel of 0…1.")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1, description="Then divided by.")
    compares: Literal["features", "pairs"] = Field(
        default="features", description="forward(images) gives features; or forward(given, wanted) gives distances."
    )
    frechet: bool = Field(default=False, description="The Fréchet distance too (FID for Inception's features).")
    covers: tuple[str, ...] = Field(default=(), description="Usual metrics that it stands for, such as alexnet_2.")


class EvaluationSection(pydantic.BaseModel):
    """The `remote_eval:` section."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    adapter: str | None = Field(default=None, description="`module:Class`.")
    data: dict[str, str] = Field(default={}, description="Name → path on the node; ${NAME}: the profile's variables.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Seed of every random generator.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="Compute type.")
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(default=8, description="Samples at a time.")
    metric_samples: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Default: the whole split.")
    user_config: dict[str, Any] = Field(default={}, description="Reaches the adapter untouched.")
    features: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")], FeatureSection] = Field(
        default={}, description="Name → pretrained network on the node; none is ever fetched."
    )

    health_passes: tuple[Literal["spectral", "spectrum"], ...] = Field(
        default=(), description="Further passes of `health` over weight matrices, each of which is read again."
    )

    @pydantic.field_validator("adapter")
    @classmethod
    def _adapter_is_an_entry_point(cls, value: str | None) -> str | None:
        return check_entry_point(value) if value is not None else None


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """Settings for the node and the digest of the file they came from (None without a file)."""

    settings: EvaluationSettings
    file_sha256: str | None = None


def load_config(
    path: Path | None,
    *,
    num_samples: int,
    adapter: str | None,
    variables: Mapping[str, str],
    data_base: Path | None,
) -> LoadedConfig:
    """Read `path` (None: defaults). `adapter` holds where the config names none.

    `data_base` is where relative data paths start: the config's folder for the embedded node, None for a real one,
    where they are refused. Raises `ConfigurationError` with file, line and field.
    """
    if path is None:
        return LoadedConfig(EvaluationSettings(adapter=adapter, num_samples=num_samples))
    raw = _read(path)
    digest = hashlib.sha256(raw).hexdigest()
    text = _as_text(raw, path)
    if not _has_section(text):
        settings = EvaluationSettings(
            adapter=adapter, num_samples=num_samples, user_config_name=path.name, user_config_text=text
        )
        return LoadedConfig(settings, digest)
    document = load_yaml(path)
    section_data = document.data[SECTION]
    if not isinstance(section_data, dict):
        raise ConfigurationError(f"{document.where(SECTION)}: expected fields (`name: value`)")
    section = validate(EvaluationSection, section_data, document, SECTION)
    data = {
        name: _data_path(value, variables, data_base, document.where(SECTION, "data", name))
        for name, value in section.data.items()
    }
    try:
        json.dumps(section.user_config)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{document.where(SECTION, 'user_config')}: {error}") from error
    settings = EvaluationSettings(
        adapter=section.adapter or adapter,
        data=data,
        seed=section.seed,
        dtype=section.dtype,
        batch_size=section.batch_size,
        num_samples=num_samples,
        metric_samples=section.metric_samples,
        user_config=section.user_config,
        user_config_name=path.name,
        user_config_text=text,
        features=_features(section.features, variables, data_base, document.where(SECTION, "features")),
        health_passes=section.health_passes,
    )
    return LoadedConfig(settings, digest)


def _features(
    named: Mapping[str, FeatureSection], variables: Mapping[str, str], base: Path | None, where: str
) -> dict[str, dict[str, Any]]:
    return {
        name: {**feature.model_dump(mode="json"), "path": _data_path(feature.path, variables, base, f"{where}: {name}")}
        for name, feature in named.items()
    }


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_USER_CONFIG_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_USER_CONFIG_BYTES} bytes", action="Is it a config?")
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", action="Check --config.") from error


def _as_text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text", action="Check --config.") from error


def _has_section(text: str) -> bool:
    """Whether the file is one of ours: its top level has the section, or would have but for a syntax error."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return re.search(rf"^{SECTION}\s*:", text, re.MULTILINE) is not None
    return isinstance(node, yaml.MappingNode) and any(key.value == SECTION for key, _ in node.value)


def _data_path(value: str, variables: Mapping[str, str], base: Path | None, where: str) -> str:
    def expand(match: re.Match[str]) -> str:
        if match.group(1) not in variables:
            known = ", ".join(sorted(variables)) or "none"
            raise ConfigurationError(
                f"{where}: the cluster profile has no variable {match.group(1)!r}",
                action=f"Add it under `variables:` in the profile. Known: {known}.",
            )
        return variables[match.group(1)]

    path = _VARIABLE.sub(expand, value)
    if path.startswith(("/", "~")):
        return path
    if base is None:
        raise ConfigurationError(
            f"{where}: {path!r} is relative, and data are on the node",
            action="Give an absolute path, one that starts with ~, or a ${VARIABLE} of the cluster profile.",
        )
    return str(base / path)
