"""Cluster profiles: YAML files that say how to reach and use a cluster."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from orchestrator.errors import ConfigurationError
from orchestrator.layout import LocalLayout
from orchestrator.ssh.settings import ConnectionSettings, RetryPolicy
from orchestrator.yamlfile import YamlDocument, load_yaml, validate
from remote_payload.wire.plan import GpuPolicy, OverrunPolicy

PROFILE_SUFFIX = ".yaml"
_MAX_EXTENDS = 8
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ContainerProfile(_Strict):
    """Run the payload inside a container image that is already on the node.

    Only runtimes without a process namespace of their own: a job must outlive the call that started it.
    """

    runtime: Literal["apptainer", "singularity"] = Field(description="Container command on the node.")
    image: str = Field(min_length=1, description="Image path or name, as the runtime takes it.")
    options: list[str] = Field(default=[], description="More options for the runtime's exec or run command.")


class PythonProfile(_Strict):
    """Which Python runs the payload. `modules` and `conda_env` are applied before `path` is looked up."""

    path: str = Field(
        default="python3", min_length=1, description="Interpreter on the node, absolute or found in PATH."
    )
    conda_env: str | None = Field(default=None, description="Conda environment to activate (name or prefix).")
    modules: list[str] = Field(default=[], description="`module load` arguments, one environment module each.")
    container: ContainerProfile | None = Field(default=None, description="Run inside this container.")


class GpuProfile(_Strict):
    """Which GPUs a job may take."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is one, else CPU."
    )
    count: Annotated[int, Field(ge=0, le=64)] = Field(default=1, description="How many GPUs a job may use.")
    min_free_gib: Annotated[float, Field(ge=0)] = Field(default=2.0, description="Free memory wanted on each, in GiB.")
    allow_shared: bool = Field(default=False, description="Whether a GPU with other users' processes may be taken.")


class BudgetsProfile(_Strict):
    """Seconds without progress that each phase may take before it counts as stuck."""

    import_: Annotated[float, Field(gt=0)] = Field(default=300.0, alias="import", description="Importing torch.")
    cuda: Annotated[float, Field(gt=0)] = Field(default=180.0, description="First CUDA call.")
    load: Annotated[float, Field(gt=0)] = Field(default=900.0, description="Opening and loading the checkpoint.")
    first_batch: Annotated[float, Field(gt=0)] = Field(default=600.0, description="The first batch.")
    run: Annotated[float, Field(gt=0)] = Field(default=900.0, description="Between two steps of the work itself.")

    def seconds(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.model_dump(by_alias=True).items()}


class RetryProfile(_Strict):
    """How long network trouble is sat out."""

    patience_s: Annotated[float, Field(ge=0)] = Field(
        default=120.0, description="Retry network trouble for this long, then pause the run."
    )
    longest_wait_s: Annotated[float, Field(gt=0)] = Field(default=30.0, description="Longest wait between two tries.")


class ClusterProfile(_Strict):
    """One cluster. Only `host` has no default, and the embedded node needs not even that."""

    extends: str | None = Field(default=None, description="Profile whose values hold where this one says nothing.")
    description: str = Field(default="", description="One line for `remote-eval clusters`.")
    host: str | None = Field(
        default=None, min_length=1, pattern=r"^[^-\s]\S*$", description="Host name, address, or ~/.ssh/config alias."
    )
    embedded: bool = Field(default=False, description="Use the node on loopback that remote-eval starts by itself.")
    user: str | None = Field(
        default=None, min_length=1, description="Login name; default: what ssh's configuration says."
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(default=None, description="SSH port.")
    transport: Literal["auto", "fabric", "openssh"] = Field(
        default="auto", description="auto: Fabric, or OpenSSH where the login needs what paramiko cannot do."
    )
    host_key_policy: Literal["strict", "ask"] = Field(
        default="strict", description="strict refuses unknown host keys; ask shows the fingerprint on a terminal."
    )
    identity_files: list[str] = Field(default=[], description="Private keys to use instead of ssh's configuration.")
    ssh_config_file: str | None = Field(default=None, description="Instead of ~/.ssh/config.")
    known_hosts_file: str | None = Field(default=None, description="Instead of ~/.ssh/known_hosts.")
    connect_timeout_s: Annotated[float, Field(gt=0)] = Field(default=15.0, description="TCP connect limit.")
    command_timeout_s: Annotated[float, Field(gt=0)] = Field(default=120.0, description="Limit for one answer.")
    node_root: str = Field(default="~/.remote-eval", min_length=1, description="Folder of our own on the node.")
    python: PythonProfile = Field(default=PythonProfile(), description="Which Python runs the payload.")
    scheduler: Literal["direct"] = Field(default="direct", description="How jobs are started.")
    gpu: GpuProfile = Field(default=GpuProfile(), description="GPU policy.")
    budgets_s: BudgetsProfile = Field(default=BudgetsProfile(), description="Phase budgets.")
    on_overrun: Literal["stop", "continue"] = Field(default="stop", description="After the stacks were written.")
    retry: RetryProfile = Field(default=RetryProfile(), description="Patience with the network.")
    pack_floats: bool = Field(
        default=True,
        description="Floats travel in fewer bytes where the link is slower than packing, which costs processor time.",
    )
    direct_copies: bool = Field(
        default=True,
        description="A copy from another cluster goes straight where that one's node can log in by itself; false: no "
        "node is asked to log in to another.",
    )
    bandwidth_limit_mbps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Upper bound for transfers, in megabits per second."
    )
    store_limit_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Most that sent files may take on the node, in GB; what no run needs goes, longest unused first.",
    )
    checkpoint_roots: list[str] = Field(
        default=[], description="Folders on the node where checkpoints are; relative CLUSTER:paths start at the first."
    )
    niceness: Annotated[int, Field(ge=0, le=19)] = Field(default=5, description="nice value of jobs.")
    variables: dict[str, str] = Field(default={}, description="Values for ${NAME} in a config's data paths.")

    def connection(self) -> ConnectionSettings:
        """What SSH needs. Only for a profile with a host: the embedded node makes its own."""
        if self.host is None:
            raise ConfigurationError("the profile has no host")
        return ConnectionSettings(
            host=self.host,
            user=self.user,
            port=self.port,
            transport=self.transport,
            host_key_policy=self.host_key_policy,
            identity_files=tuple(Path(p).expanduser() for p in self.identity_files),
            ssh_config_file=Path(self.ssh_config_file).expanduser() if self.ssh_config_file else None,
            known_hosts_files=(Path(self.known_hosts_file).expanduser(),) if self.known_hosts_file else (),
            connect_timeout_s=self.connect_timeout_s,
        )

    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(patience_s=self.retry.patience_s, longest_wait_s=self.retry.longest_wait_s)

    def gpu_policy(self) -> GpuPolicy:
        return GpuPolicy(self.gpu.device, self.gpu.count, int(self.gpu.min_free_gib * 1024**3), self.gpu.allow_shared)

    @property
    def bandwidth_limit_bytes_per_s(self) -> float | None:
        return self.bandwidth_limit_mbps * 1e6 / 8 if self.bandwidth_limit_mbps is not None else None

    @property
    def store_limit_bytes(self) -> int | None:
        return int(self.store_limit_gb * 1e9) if self.store_limit_gb is not None else None

    def overrun_policy(self) -> OverrunPolicy:
        return OverrunPolicy(self.budgets_s.seconds(), self.on_overrun)


class NamedProfile(_Strict):
    """A profile with the name it is called by and the file it came from."""

    name: str = Field(pattern=_NAME)
    source: str
    profile: ClusterProfile


def json_schema() -> dict[str, Any]:
    """JSON Schema of a profile file, for editors."""
    schema = ClusterProfile.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "remote-eval cluster profile"
    return schema


def profile_folders(layout: LocalLayout, project_folder: Path | None) -> list[Path]:
    """Where profiles are looked for, first match wins: the project's, the user's, the ones that come with us."""
    folders = [project_folder / "cluster_profiles"] if project_folder else []
    folders.append(layout.user_profiles)
    folders.append(Path(str(resources.files("cluster_profiles"))))
    return folders


def find_profiles(layout: LocalLayout, project_folder: Path | None) -> dict[str, Path]:
    """Every profile by name."""
    found: dict[str, Path] = {}
    for folder in profile_folders(layout, project_folder):
        for path in sorted(folder.glob("*" + PROFILE_SUFFIX)):
            found.setdefault(path.stem, path)
    return found


def load_profile(name_or_path: str, layout: LocalLayout, project_folder: Path | None) -> NamedProfile:
    """Load by name, or by path where it holds a slash or ends in `.yaml`, with `extends` resolved.

    Raises `ConfigurationError`: unknown name (nearest names told), unknown key or wrong value (file, line, field told).
    """
    known = find_profiles(layout, project_folder)
    path = _profile_path(name_or_path, known)
    documents = list(_extends_chain(path, known))
    merged: dict[str, Any] = {}
    for document in reversed(documents):
        validate(ClusterProfile, document.data, document)
        merged = _merge(merged, document.data)
    profile = validate(ClusterProfile, {**merged, "extends": None}, documents[0])
    if profile.host is None and not profile.embedded:
        raise ConfigurationError(
            f"{path}: field 'host' is missing", action="Add `host: NAME`, an alias of ~/.ssh/config or an address."
        )
    return NamedProfile(name=path.stem, source=str(path), profile=profile)


def _profile_path(name_or_path: str, known: Mapping[str, Path]) -> Path:
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"there is no cluster profile at {path}", action="Check the path.")
        return path
    if name_or_path in known:
        return known[name_or_path]
    nearest = difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigurationError(
        f"there is no cluster named {name_or_path!r}",
        action=f"{hint}Known clusters: {', '.join(sorted(known)) or 'none'}.",
    )


def _extends_chain(path: Path, known: Mapping[str, Path]) -> Iterator[YamlDocument]:
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current in seen or len(seen) >= _MAX_EXTENDS:
            chain = " -> ".join(p.name for p in [*seen, current])
            raise ConfigurationError(f"{path}: 'extends' runs in a circle: {chain}")
        seen.append(current)
        document = load_yaml(current)
        yield document
        parent = document.data.get("extends")
        current = None
        if parent is not None:
            if not isinstance(parent, str):
                raise ConfigurationError(f"{document.where('extends')}: expected the name of a profile")
            here = document.path.parent / f"{parent}{PROFILE_SUFFIX}"
            is_other = here.is_file() and here != document.path
            current = here if is_other else _profile_path(parent, known)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def dump_schema() -> str:
    return json.dumps(json_schema(), indent=2, sort_keys=True) + "\n"
