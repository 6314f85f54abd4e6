"""From a collected run folder to results.json, report.html and report.md."""

from orchestrator.report.results import AttemptOutcome, build_results, dump_results
from orchestrator.report.schema import results_schema
from orchestrator.report.verdict import verdict_sentence
from orchestrator.report.write import write_report

__all__ = [
    "AttemptOutcome",
    "build_results",
    "dump_results",
    "results_schema",
    "verdict_sentence",
    "write_report",
]
