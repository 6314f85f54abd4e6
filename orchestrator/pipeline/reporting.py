"""report: the three documents, and the run's row in the history."""

from __future__ import annotations

from typing import Any

from orchestrator.history import earlier_runs, record_run
from orchestrator.pipeline.context import RunContext
from orchestrator.report import AttemptOutcome, build_results, write_report


def report(context: RunContext, attempt: AttemptOutcome | None = None) -> dict[str, Any]:
    """Write report.html, report.md and results.json from the run folder, and return the results.

    `attempt` tells what the folder cannot: that the attempt was lost.
    """
    layout = context.services.layout
    earlier = earlier_runs(layout, build_results(context.run, attempt=attempt))
    results = write_report(context.run, earlier, attempt)
    record_run(layout, results)
    return results
