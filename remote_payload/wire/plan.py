"""What the node is told about a run: `plan.json`."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

BUILTIN_JOBS = ("health", "reconstruct")
HEALTH_PASSES = ("spectral", "spectrum")
"""What `health` does with weight matrices only if it is asked to, since each is read again."""


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """`entry` is `builtin` or the user's `module:function`, found in the shipped code."""

    name: str
    entry: str = "builtin"

    @property
    def reads_weights_only(self) -> bool:
        """Whether all that it reads of a checkpoint is the header and the model's weights."""
        return self == JobSpec("reconstruct")

    @property
    def reads_as_it_arrives(self) -> bool:
        """Whether it can begin with the header, and reads what comes as it comes."""
        return self == JobSpec("health")

    def begins_without_rest(self, settings: EvaluationSettings) -> bool:
        """Whether it begins, on the CPU, while what it reads is still arriving. Further passes are worth a GPU, which
        is not held for a job that waits: they wait without one."""
        return self.reads_as_it_arrives and not settings.health_passes


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The `remote_eval:` section of a config, defaults filled in.

    `adapter` is `module:Class`; `data` maps names to paths on the node; `user_config` reaches the adapter untouched,
    and so does `user_config_text` (the whole text of a config that is the user's own, with its file name).
    `dtype` is one of auto, float32, bfloat16, float16. `metric_samples` None means the whole split. `features` names
    pretrained networks on the node by which images are compared, each with its `path` and how images are prepared.
    `health_passes`: any of `HEALTH_PASSES`.
    """

    adapter: Optional[str] = None
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    dtype: str = "auto"
    batch_size: int = 8
    num_samples: int = 4
    metric_samples: Optional[int] = None
    user_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    user_config_name: Optional[str] = None
    user_config_text: Optional[str] = None
    features: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    health_passes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GpuPolicy:
    """`device` is auto, cpu or cuda; `count` GPUs with `min_free_bytes` free each; others' processes are avoided."""

    device: str = "auto"
    count: int = 1
    min_free_bytes: int = 2 * 1024**3
    allow_shared: bool = False


@dataclasses.dataclass(frozen=True)
class OverrunPolicy:
    """Seconds without progress allowed per phase, and what happens after: `stop` the job or `continue`."""

    budgets_s: dict[str, float] = dataclasses.field(default_factory=dict)
    action: str = "stop"
    cancel_grace_s: float = 10.0


@dataclasses.dataclass(frozen=True)
class CodeSource:
    """The user's shipped code: archive sha256, git SHA and whether the tree was dirty when it was packed."""

    archive_sha256: str
    git_sha: Optional[str] = None
    dirty: Optional[bool] = None


@dataclasses.dataclass(frozen=True)
class NodePlan:
    """Everything a job needs, fixed before it starts.

    `checkpoint_path` is absolute on the node. `checkpoint_digest` is None for a file used in place whose digest nobody
    has computed yet; its `checkpoint_fingerprint` then stands for it: [size, mtime_ns, inode].
    """

    run_id: str
    payload_sha256: str
    jobs: tuple[JobSpec, ...]
    checkpoint_path: str
    settings: EvaluationSettings
    gpu: GpuPolicy
    overrun: OverrunPolicy
    checkpoint_digest: Optional[str] = None
    checkpoint_fingerprint: tuple[int, ...] = ()
    code: Optional[CodeSource] = None
    plan_key: str = ""
    niceness: int = 5
    schema: int = 1
