"""The history's table: record, list, rebuild, and find what a run is to be compared with."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from orchestrator.history.database import open_database, read_database, transaction
from orchestrator.history.rows import HistoryRow, row_from_results
from orchestrator.layout import LocalLayout
from remote_payload.wire.codec import WireError

MAX_RESULTS_BYTES = 256 * 1024 * 1024
_COMPONENT = "history"
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS history_runs (
  run_id TEXT PRIMARY KEY,
  created_at TEXT NOT NULL,
  cluster TEXT,
  checkpoint TEXT,
  lineage TEXT NOT NULL,
  target_lineage TEXT,
  state TEXT NOT NULL,
  overall TEXT NOT NULL,
  row TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS history_by_time ON history_runs (created_at, run_id);
CREATE INDEX IF NOT EXISTS history_by_lineage ON history_runs (lineage, created_at)
"""
_INSERT = "INSERT OR REPLACE INTO history_runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclasses.dataclass(frozen=True)
class RebuildReport:
    """What a rebuild found. `unreadable` lists (run id, why); `kept` rows have no run folder any more."""

    recorded: int
    kept: int
    unreadable: tuple[tuple[str, str], ...]


def record_run(layout: LocalLayout, results: Mapping[str, Any]) -> HistoryRow:
    """Keep the run's summary; recording it again replaces it. On the disk when it returns."""
    row = row_from_results(results)
    with _open(layout) as connection, transaction(connection):
        connection.execute(_INSERT, _values(row))
    return row


def list_runs(
    layout: LocalLayout,
    *,
    cluster: str | None = None,
    checkpoint: str | None = None,
    overall: str | None = None,
    limit: int = 50,
) -> list[HistoryRow]:
    """Runs, newest first; `checkpoint` matches any part of the reference. Creates nothing, waits for no writer."""
    asked = {"cluster = ?": cluster, "instr(checkpoint, ?) > 0": checkpoint, "overall = ?": overall}
    chosen = {clause: value for clause, value in asked.items() if value is not None}
    return _select(layout, " AND ".join(chosen) or "1", list(chosen.values()), limit)


def earlier_runs(layout: LocalLayout, results: Mapping[str, Any], limit: int = 10) -> list[HistoryRow]:
    """Finished runs before this one on the same lineage or nightly target, newest first."""
    row = row_from_results(results)
    where = (
        "(lineage = ? OR (target_lineage IS NOT NULL AND target_lineage = ?)) AND run_id != ? AND state = 'succeeded'"
        " AND (created_at, run_id) < (?, ?)"
    )
    values = [row.lineage, row.target_lineage, row.run_id, row.created_at or "", row.run_id]
    return _select(layout, where, values, limit)


def rebuild(layout: LocalLayout) -> RebuildReport:
    """Record every run folder's results.json anew, all or nothing. Rows whose folder is gone stay."""
    rows: list[HistoryRow] = []
    unreadable: list[tuple[str, str]] = []
    folders = sorted(layout.runs.iterdir()) if layout.runs.is_dir() else []
    for folder in folders:
        path = folder / "results.json"
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_RESULTS_BYTES:
                raise ValueError("larger than any results.json")
            row = row_from_results(json.loads(path.read_text(encoding="utf-8")))
            if row.run_id != folder.name:
                raise ValueError(f"it is about run {row.run_id!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            unreadable.append((folder.name, f"{type(error).__name__}: {error}"))
            continue
        rows.append(row)
    with _open(layout) as connection, transaction(connection):
        connection.executemany(_INSERT, [_values(row) for row in rows])
        total = int(connection.execute("SELECT COUNT(*) FROM history_runs").fetchone()[0])
    return RebuildReport(len(rows), total - len(rows), tuple(unreadable))


def _open(layout: LocalLayout) -> Any:
    return open_database(layout.database, _SCHEMA, component=_COMPONENT, version=_VERSION)


def _select(layout: LocalLayout, where: str, values: list[Any], limit: int) -> list[HistoryRow]:
    query = f"SELECT row FROM history_runs WHERE {where} ORDER BY created_at DESC, run_id DESC LIMIT ?"  # noqa: S608
    with read_database(layout.database, component=_COMPONENT, version=_VERSION) as connection:
        if connection is None:
            return []
        found: list[sqlite3.Row] = connection.execute(query, [*values, limit]).fetchall()
    rows = []
    for (document,) in found:
        try:
            rows.append(HistoryRow.from_json(json.loads(document)))
        except (WireError, ValueError):
            continue
    return rows


def _values(row: HistoryRow) -> tuple[Any, ...]:
    # Runs without a time sort first, as the oldest.
    return (
        row.run_id,
        row.created_at or "",
        row.cluster,
        row.checkpoint,
        row.lineage,
        row.target_lineage,
        row.state,
        row.overall,
        json.dumps(row.to_json(), sort_keys=True),
    )
