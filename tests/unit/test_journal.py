"""The journal: what is written stays, in order, and adds up to where the run stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from orchestrator.journal import Journal, fold


def test_entries_come_back_in_order_and_by_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite3")
    for n in range(5):
        journal.append("a", "note", n=n)
        journal.append("b", "note", n=-n)
    assert [e.data["n"] for e in journal.entries("a")] == [0, 1, 2, 3, 4]
    assert journal.run_ids() == ["b", "a"]


def test_an_entry_outlives_a_client_that_is_killed_right_after_writing_it(tmp_path: Path) -> None:
    database = tmp_path / "j.sqlite3"
    program = (
        "import os, sys, pathlib; from orchestrator.journal import Journal; "
        "Journal(pathlib.Path(sys.argv[1])).append('r', 'launch_intent', attempt=1, nonce='n'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(database)], timeout=60)
    assert done.returncode == -9
    assert fold(Journal(database).entries("r")).current_attempt is not None


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    database = tmp_path / "j.sqlite3"
    program = (
        "import sys, pathlib; from orchestrator.journal import Journal; j = Journal(pathlib.Path(sys.argv[1]))\n"
        "for n in range(25): j.append('r', 'note', n=n)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(database)]) for _ in range(4)]
    assert [w.wait(timeout=120) for w in writers] == [0, 0, 0, 0]
    assert len(Journal(database).entries("r")) == 100


def test_a_new_intent_makes_what_was_collected_before_no_longer_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite3")
    journal.append("r", "planned")
    journal.append("r", "launch_intent", attempt=1, nonce="x")
    journal.append("r", "launched", attempt=1, nonce="x")
    journal.append("r", "terminal", attempt=1, state="failed")
    journal.append("r", "collected", attempt=1)
    journal.append("r", "reported")
    record = fold(journal.entries("r"))
    assert record.reported
    assert record.collected == 1
    journal.append("r", "launch_intent", attempt=2, nonce="y")
    record = fold(journal.entries("r"))
    assert (record.collected, record.reported) == (None, False)
    assert record.current_attempt is not None
    assert (record.current_attempt.number, record.current_attempt.fate) == (2, "intended")
    assert (record.attempts[0].fate, record.attempts[0].state) == ("terminal", "failed")
