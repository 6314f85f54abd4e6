"""What every stage works with."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from orchestrator.journal import Journal, RunRecord, fold
from orchestrator.layout import LocalLayout, RunLayout
from orchestrator.node import Node
from orchestrator.payload import Payload
from orchestrator.plan import RunPlan
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.settings import RetryNotice
from orchestrator.transfer.direct import DirectWay
from orchestrator.transfer.progress import TransferProgress
from remote_payload.wire.results import Finding
from remote_payload.wire.states import AttemptStatus


class Reporter(Protocol):
    """Whom the stages tell what they do. Nothing that it does may change what happens."""

    def stage(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def finding(self, finding: Finding) -> None: ...

    def retry(self, notice: RetryNotice) -> None: ...

    def transfer(self, what: str, progress: TransferProgress) -> None: ...

    def attempt(self, status: AttemptStatus) -> None: ...


@dataclasses.dataclass(frozen=True)
class Services:
    """What the pipeline needs of the world. `open_node` makes no connection yet. `bandwidth_limit_mbps`: of all
    transfers of this command, instead of the profile's own limit."""

    layout: LocalLayout
    journal: Journal
    reporter: Reporter
    open_node: Callable[[ClusterProfile, Payload], Node]
    bandwidth_limit_mbps: float | None = None


@dataclasses.dataclass(frozen=True)
class RunContext:
    """One run under way. `source`: the node that holds the checkpoint, where that is another than the run's. `way`: the
    direct one from there, which is tried once for all that is copied."""

    plan: RunPlan
    run: RunLayout
    profile: ClusterProfile
    node: Node
    services: Services
    source: Node | None = None
    way: DirectWay | None = None

    def __enter__(self) -> RunContext:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the connections; what is asked of a node afterwards makes a new one."""
        self.node.disconnect()
        if self.source is not None:
            self.source.disconnect()

    @property
    def journal(self) -> Journal:
        return self.services.journal

    @property
    def reporter(self) -> Reporter:
        return self.services.reporter

    def record(self) -> RunRecord:
        """Where the run stands now, by its journal."""
        return fold(self.journal.entries(self.plan.run_id))

    def note_entry(self, kind: str, **data: object) -> None:
        self.journal.append(self.plan.run_id, kind, **data)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Journal and show the beginning and the end of a stage."""
        self.reporter.stage(name)
        self.note_entry("stage_began", stage=name)
        began = time.monotonic()
        yield
        self.note_entry("stage_ended", stage=name, seconds=round(time.monotonic() - began, 3))
