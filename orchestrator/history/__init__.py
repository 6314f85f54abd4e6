"""What earlier runs found: one row a run, in the journal's SQLite file, rebuildable from the run folders."""

from orchestrator.history.compare import Change, compare, regressions
from orchestrator.history.database import file_system_warning
from orchestrator.history.rows import HistoryRow, MetricValue, row_from_results
from orchestrator.history.store import RebuildReport, earlier_runs, list_runs, rebuild, record_run

__all__ = [
    "Change",
    "HistoryRow",
    "MetricValue",
    "RebuildReport",
    "compare",
    "earlier_runs",
    "file_system_warning",
    "list_runs",
    "rebuild",
    "record_run",
    "regressions",
    "row_from_results",
]
