"""The adapter checked on a node, by the same preflight that a run begins with; no run comes of it."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.doctor import Check, CheckState
from orchestrator.payload import payload_for
from orchestrator.pipeline.context import RunContext, Services
from orchestrator.pipeline.preflight import examine
from orchestrator.pipeline.resolve import Request, draft
from remote_payload.wire.messages import Preflight
from remote_payload.wire.names import printable
from remote_payload.wire.results import Severity

_STATES = {Severity.ERROR: CheckState.ERROR, Severity.WARNING: CheckState.WARNING, Severity.INFO: CheckState.OK}


def check_on_node(request: Request, services: Services) -> list[Check]:
    """Meta-device build, shapes, signatures, one real sample and a dry run. Raises what resolving, connecting and
    reading the checkpoint's header raise."""
    plan = draft(request, services)
    profile = plan.cluster_profile()
    node = services.open_node(profile, payload_for(plan.payload_sha256, services.layout))
    context = RunContext(plan, services.layout.run(plan.run_id), profile, node, services)
    with node:
        return list(_checks(examine(context)))


def _checks(report: Preflight) -> Iterator[Check]:
    yield Check("node", CheckState.OK, printable(f"Python {report.python_version}, torch {report.torch_version}"))
    for step in report.adapter_steps:
        yield Check("adapter", CheckState.OK, printable(step))
    for finding in report.findings:
        where = f" [{', '.join(finding.where[:5])}]" if finding.where else ""
        text = f"{finding.title}{where}. {finding.explanation}".strip()
        yield Check(finding.id, _STATES[finding.severity], printable(text), printable(finding.action))
