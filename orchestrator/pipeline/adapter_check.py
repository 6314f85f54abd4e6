"""The adapter checked on a node, by the same preflight that a run begins with; no run comes of it."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.doctor import Check, CheckState
from orchestrator.pipeline.context import Services
from orchestrator.pipeline.preflight import examine
from orchestrator.pipeline.resolve import Request, draft
from orchestrator.pipeline.run import open_run
from remote_payload.wire.names import printable
from remote_payload.wire.results import Severity
from remote_payload.wire.run_messages import Preflight

_STATES = {Severity.ERROR: CheckState.ERROR, Severity.WARNING: CheckState.WARNING, Severity.INFO: CheckState.OK}


def check_on_node(request: Request, services: Services) -> list[Check]:
    """Meta-device build, shapes, signatures, one real sample and a dry run. Raises what resolving, connecting and
    reading the checkpoint's header raise."""
    with open_run(draft(request, services), services) as context:
        return list(_checks(examine(context)))


def _checks(report: Preflight) -> Iterator[Check]:
    yield Check("node", CheckState.OK, printable(f"Python {report.python_version}, torch {report.torch_version}"))
    for step in report.adapter_steps:
        yield Check("adapter", CheckState.OK, printable(step))
    for finding in report.findings:
        where = f" [{', '.join(finding.where[:5])}]" if finding.where else ""
        text = f"{finding.title}{where}. {finding.explanation}".strip()
        yield Check(finding.id, _STATES[finding.severity], printable(text), printable(finding.action))
