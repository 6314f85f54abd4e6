"""What each target's last evaluation was of, and what it came to; in the journal's SQLite file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator

from orchestrator.history.database import open_database, transaction
from orchestrator.layout import LocalLayout

_COMPONENT = "nightly"
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS nightly_targets (
  name TEXT PRIMARY KEY,
  identity TEXT NOT NULL,
  definition_key TEXT NOT NULL,
  run_id TEXT NOT NULL,
  overall TEXT NOT NULL,
  regressions TEXT NOT NULL
)
"""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of a target: of which checkpoint, under which definition, and its result."""

    identity: str
    definition_key: str
    run_id: str
    overall: str
    regressions: tuple[str, ...]


class NightlyState:
    """Last evaluations by target name."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, layout: LocalLayout) -> Iterator[NightlyState]:
        with open_database(layout.database, _SCHEMA, component=_COMPONENT, version=_VERSION) as connection:
            yield cls(connection)

    def last(self, name: str) -> Evaluation | None:
        row = self._connection.execute(
            "SELECT identity, definition_key, run_id, overall, regressions FROM nightly_targets WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            return None
        identity, definition_key, run_id, overall, regressions = row
        return Evaluation(identity, definition_key, run_id, overall, tuple(json.loads(regressions)))

    def record(self, name: str, evaluation: Evaluation) -> None:
        """On the disk when it returns."""
        with transaction(self._connection):
            self._connection.execute(
                "INSERT OR REPLACE INTO nightly_targets VALUES (?, ?, ?, ?, ?, ?)",
                (
                    name,
                    evaluation.identity,
                    evaluation.definition_key,
                    evaluation.run_id,
                    evaluation.overall,
                    json.dumps(evaluation.regressions),
                ),
            )
