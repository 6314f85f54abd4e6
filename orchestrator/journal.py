"""What has happened to a run, append-only, on the local disk before the next thing is done.

The pipeline writes an entry before an act that cannot be repeated blindly and after each that is done, and reads them
back to know where a run stands. A state is never stored: it is what the entries add up to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import InternalError

BUSY_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal_entries (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  run_id TEXT NOT NULL,
  at REAL NOT NULL,
  kind TEXT NOT NULL,
  data TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS journal_by_run ON journal_entries (run_id, id);
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that happened; `at` is this machine's wall clock, for people only."""

    run_id: str
    at: float
    kind: str
    data: dict[str, Any]


class Journal:
    """Entries by run. Every `append` is on the disk when it returns. Safe for several processes at once."""

    def __init__(self, database: Path) -> None:
        self._database = database
        database.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with self._connection() as connection:
                connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise InternalError(
                f"cannot open the journal {database}: {error}", action="Check space and owner."
            ) from error
        database.chmod(0o600)

    def append(self, run_id: str, kind: str, **data: Any) -> None:
        """Record that `kind` happened. Raises `InternalError` where it could not: then it must not happen."""
        text = json.dumps(data, sort_keys=True)
        try:
            with self._connection() as connection, connection:
                connection.execute(
                    "INSERT INTO journal_entries (run_id, at, kind, data) VALUES (?, ?, ?, ?)",
                    (run_id, time.time(), kind, text),
                )
        except sqlite3.Error as error:
            raise InternalError(
                f"cannot write the journal {self._database}: {error}", action="Free space on this machine, then resume."
            ) from error

    def entries(self, run_id: str) -> list[Entry]:
        """All entries of one run in order."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT run_id, at, kind, data FROM journal_entries WHERE run_id = ? ORDER BY id", (run_id,)
            ).fetchall()
        return [Entry(r[0], r[1], r[2], json.loads(r[3])) for r in rows]

    def run_ids(self) -> list[str]:
        """Every run known here, newest first."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT run_id FROM journal_entries GROUP BY run_id ORDER BY MIN(id) DESC"
            ).fetchall()
        return [str(r[0]) for r in rows]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._database, timeout=BUSY_TIMEOUT_S)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        finally:
            connection.close()


@dataclasses.dataclass(frozen=True)
class AttemptRecord:
    """What the journal knows of one attempt. `fate`: intended, launched, void, terminal or lost."""

    number: int
    nonce: str
    fate: str
    state: str | None = None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run's entries add up to.

    `synced`: the checkpoint is on the node in full. `synced_partly`: its header and weights are.
    """

    planned: bool
    synced: dict[str, Any] | None
    synced_partly: dict[str, Any] | None
    attempts: tuple[AttemptRecord, ...]
    collected: int | None
    reported: bool
    last_error: dict[str, Any] | None
    stage_seconds: dict[str, float]

    @property
    def current_attempt(self) -> AttemptRecord | None:
        return self.attempts[-1] if self.attempts else None


def fold(entries: list[Entry]) -> RunRecord:
    """Entries → where the run stands. Pure."""
    planned, reported = False, False
    synced: dict[str, Any] | None = None
    synced_partly: dict[str, Any] | None = None
    attempts: dict[int, AttemptRecord] = {}
    collected: int | None = None
    last_error: dict[str, Any] | None = None
    seconds: dict[str, float] = {}
    for entry in entries:
        data = entry.data
        if entry.kind == "planned":
            planned = True
        elif entry.kind == "synced":
            synced, synced_partly = data, None
        elif entry.kind == "synced_partly":
            synced, synced_partly = None, data
        elif entry.kind == "launch_intent":
            attempts[data["attempt"]] = AttemptRecord(data["attempt"], data["nonce"], "intended")
            collected, reported = None, False
        elif entry.kind in ("launched", "void", "terminal", "lost"):
            known = attempts[data["attempt"]]
            attempts[data["attempt"]] = dataclasses.replace(
                known, fate=entry.kind, state=data.get("state", known.state)
            )
        elif entry.kind == "collected":
            collected = data["attempt"]
        elif entry.kind == "reported":
            reported = True
        elif entry.kind == "stage_ended":
            seconds[data["stage"]] = seconds.get(data["stage"], 0.0) + data["seconds"]
        if entry.kind == "stopped":
            last_error = data
        elif entry.kind == "stage_began":
            last_error = None
    ordered = tuple(attempts[n] for n in sorted(attempts))
    return RunRecord(planned, synced, synced_partly, ordered, collected, reported, last_error, seconds)
