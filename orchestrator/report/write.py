"""Writing a run's three documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.fsutil import write_atomically
from orchestrator.history.rows import HistoryRow
from orchestrator.layout import RunLayout
from orchestrator.report.documents import load_documents
from orchestrator.report.html import render_html
from orchestrator.report.markdown import render_markdown
from orchestrator.report.results import AttemptOutcome, dump_results, results_from_documents


def write_report(
    run: RunLayout, earlier: Sequence[HistoryRow] = (), attempt: AttemptOutcome | None = None
) -> dict[str, Any]:
    """Write report.html, report.md and, last, results.json, each old or new and never half; return the results.

    The arguments are `build_results`'s. results.json comes last, so that its presence means that all three are there.
    """
    documents = load_documents(run)
    results = results_from_documents(documents, earlier, attempt)
    html = render_html(run, results, documents.documents)
    markdown = render_markdown(run, results)
    write_atomically(run.report_html, html.encode())
    write_atomically(run.report_markdown, markdown.encode())
    write_atomically(run.results, dump_results(results).encode())
    return results
