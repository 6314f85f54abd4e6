"""report: the three documents, and the run's row in the history."""

from __future__ import annotations

from typing import Any

from orchestrator.history import earlier_runs, record_run
from orchestrator.pipeline.context import RunContext
from orchestrator.report import build_results, write_report


def report(context: RunContext) -> dict[str, Any]:
    """Write report.html, report.md and results.json from the run folder alone, and return the results."""
    layout = context.services.layout
    earlier = earlier_runs(layout, build_results(context.run))
    results = write_report(context.run, earlier)
    record_run(layout, results)
    return results
