"""The states of an attempt and its jobs, and the truth file that records them."""

from __future__ import annotations

import dataclasses
import enum
from typing import Optional


class AttemptState(str, enum.Enum):
    """What one launch of a run has come to. Only the last three are terminal records."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self is not AttemptState.RUNNING


class JobState(str, enum.Enum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NOT_RUN = "not_run"


class Decision(str, enum.Enum):
    """Who got to an attempt first: its supervisor, or whoever gave the attempt up."""

    STARTED = "started"
    VOID = "void"


class Phase(str, enum.Enum):
    """Where a job is. Each has a budget in seconds without progress (profile `budgets_s`)."""

    IMPORT = "import"
    CUDA = "cuda"
    LOAD = "load"
    FIRST_BATCH = "first_batch"
    RUN = "run"


@dataclasses.dataclass(frozen=True)
class ProcessIdentity:
    """One process on one boot of one machine: a pid alone is reused."""

    pid: int
    start_time: str
    boot_id: str
    machine_id: str


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """Progress is `counter` of `total`; only its change counts, judged on the reader's own clock.

    `process` leads the job's process group while the job runs.
    """

    state: JobState = JobState.PENDING
    phase: Optional[Phase] = None
    counter: int = 0
    total: Optional[int] = None
    message: str = ""
    exit_status: Optional[int] = None
    signal: Optional[int] = None
    error: Optional[str] = None
    overran: tuple[str, ...] = ()
    started_at: Optional[float] = None
    ended_at: Optional[float] = None
    process: Optional[ProcessIdentity] = None


@dataclasses.dataclass(frozen=True)
class AttemptStatus:
    """The truth file `status.json`. `heartbeat` grows while the supervisor lives; `cause` says why it failed."""

    run_id: str
    attempt: int
    nonce: str
    state: AttemptState
    supervisor: ProcessIdentity
    jobs: dict[str, JobStatus]
    heartbeat: int = 0
    cause: Optional[str] = None
    started_at: float = 0.0
    ended_at: Optional[float] = None
    schema: int = 1
