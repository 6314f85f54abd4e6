"""The history: recorded, listed, rebuilt, compared, while others use the same file."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from report_run_maker import document, finding, make_run, metric

from orchestrator.errors import ConfigurationError, InternalError, RemoteEvalError
from orchestrator.history import earlier_runs, list_runs, rebuild, record_run, row_from_results
from orchestrator.history.database import network_file_system, open_database
from orchestrator.layout import LocalLayout
from orchestrator.report import build_results, write_report

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/me/local xfs rw 0 0
//nas/x /mnt/with\\040space cifs rw 0 0
me@host: /mnt/there fuse.sshfs rw 0 0
"""


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


def finished_run(layout: LocalLayout, run_id: str, day: int, **over: object) -> dict:
    """A run that has its report, in the data folder."""
    created = {"created_at": f"2026-01-{day:02}T00:00:00+00:00"}
    plan_over = {**created, **over.pop("plan_over", {})}  # type: ignore[dict-item]
    documents = over.pop("documents", {"reconstruct": document("reconstruct", metrics=[metric()])})
    run = make_run(layout.runs / run_id, documents, provenance=created, plan_over=plan_over, **over)  # type: ignore[arg-type]
    return write_report(run)


def test_nothing_recorded_lists_nothing_and_creates_nothing(layout: LocalLayout) -> None:
    assert list_runs(layout) == []
    assert not layout.data.exists()


def test_runs_are_listed_newest_first_and_by_filter(layout: LocalLayout) -> None:
    for run_id, day, cluster in (("a", 2, "one"), ("b", 3, "two"), ("c", 1, "one")):
        record_run(layout, finished_run(layout, run_id, day, plan_over={"cluster": cluster}))
    assert [r.run_id for r in list_runs(layout)] == ["b", "a", "c"]
    assert [r.run_id for r in list_runs(layout, cluster="one")] == ["a", "c"]
    assert [r.run_id for r in list_runs(layout, checkpoint="best")] == ["b", "a", "c"]
    assert list_runs(layout, checkpoint="other%") == []
    assert [r.run_id for r in list_runs(layout, overall="not_measured", limit=1)] == ["b"]
    assert list_runs(layout)[0].key_metrics == {"fmri.voxelwise_correlation (fmri)": 0.21}


def test_recording_a_run_again_replaces_its_row(layout: LocalLayout) -> None:
    results = finished_run(layout, "a", 1)
    record_run(layout, results)
    results["verdict"]["overall"] = "fail"
    record_run(layout, results)
    assert [(r.run_id, r.overall) for r in list_runs(layout)] == [("a", "fail")]


def test_a_rebuild_from_folders_gives_the_recorded_rows(layout: LocalLayout) -> None:
    for run_id, day in (("a", 1), ("b", 2)):
        record_run(layout, finished_run(layout, run_id, day))
    before = list_runs(layout)
    for leftover in layout.data.glob("remote-eval.sqlite3*"):
        leftover.unlink()
    report = rebuild(layout)
    assert (report.recorded, report.kept, report.unreadable) == (2, 0, ())
    assert list_runs(layout) == before


def test_a_rebuild_passes_over_what_it_cannot_read_and_says_so(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "good", 1))
    for name, content in (("torn", b'{"run":'), ("odd", b"[]"), ("other", b'{"run": null}'), ("binary", b"\xff")):
        folder = layout.runs / name
        folder.mkdir()
        (folder / "results.json").write_bytes(content)
    (layout.runs / "unfinished").mkdir()
    moved = layout.runs / "copied"
    moved.mkdir()
    (moved / "results.json").write_bytes((layout.runs / "good" / "results.json").read_bytes())
    report = rebuild(layout)
    assert report.recorded == 1
    assert sorted(name for name, _ in report.unreadable) == ["binary", "copied", "odd", "other", "torn"]


def test_a_row_outlives_its_run_folder(layout: LocalLayout) -> None:
    results = finished_run(layout, "a", 1)
    record_run(layout, results)
    (layout.runs / "a" / "results.json").unlink()
    assert rebuild(layout).kept == 1
    assert [r.run_id for r in list_runs(layout)] == ["a"]


def test_only_earlier_finished_runs_on_the_same_lineage_are_compared_with(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "older", 1))
    record_run(layout, finished_run(layout, "newer", 9))
    record_run(layout, finished_run(layout, "elsewhere", 2, plan_over={"checkpoint": {"path": "/other.pt"}}))
    record_run(layout, finished_run(layout, "other-config", 2, plan_over={"config_sha256": "00" * 32}))
    record_run(layout, finished_run(layout, "broken", 3, attempt_state="failed"))
    current = finished_run(layout, "current", 5)
    record_run(layout, current)
    assert [r.run_id for r in earlier_runs(layout, current)] == ["older"]


def test_a_nightly_target_is_a_lineage_of_its_own(layout: LocalLayout) -> None:
    night = {"nightly_target": "best"}
    record_run(layout, finished_run(layout, "a", 1, plan_over={**night, "checkpoint": {"path": "/e1.pt"}}))
    current = finished_run(layout, "b", 2, plan_over={**night, "checkpoint": {"path": "/e2.pt"}})
    assert [r.run_id for r in earlier_runs(layout, current)] == ["a"]


def test_relative_checkpoints_of_two_projects_are_two_lineages(tmp_path: Path) -> None:
    rows = []
    for project in ("/one", "/two"):
        over = {"checkpoint": {"path": "best.pt", "cluster": None}, "project_folder": project}
        run = make_run(tmp_path / project[1:] / "r1", {}, plan_over=over)
        rows.append(row_from_results(build_results(run)))
    assert rows[0].lineage != rows[1].lineage


def test_listing_works_while_another_process_is_writing(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "a", 1))
    script = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('DELETE FROM history_runs')\n"
        "print('writing', flush=True)\n"
        "sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", script, str(layout.database)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        assert [r.run_id for r in list_runs(layout)] == ["a"]
        writer.communicate("", timeout=30)


def test_many_processes_record_at_once_from_the_very_first_and_none_is_lost(layout: LocalLayout) -> None:
    names = [f"r{i}" for i in range(6)]
    for day, name in enumerate(names, 1):
        finished_run(layout, name, day)
    script = (
        "import json, pathlib, sys\n"
        "from orchestrator.history import record_run\n"
        "from orchestrator.layout import LocalLayout\n"
        "layout = LocalLayout(*(pathlib.Path(p) for p in sys.argv[1:4]))\n"
        "results = json.loads(layout.run(sys.argv[4]).results.read_text())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "record_run(layout, results)\n"
    )
    folders = [str(p) for p in (layout.data, layout.config, layout.cache)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *folders, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=60) for process in processes] == [0] * len(names)
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert sorted(r.run_id for r in list_runs(layout)) == names


def test_a_new_file_that_many_open_at_once_is_everyones(tmp_path: Path) -> None:
    schema = "CREATE TABLE IF NOT EXISTS some (x)"
    errors: list[Exception] = []

    def open_it(path: Path, together: threading.Barrier) -> None:
        together.wait(30)
        try:
            with open_database(path, schema, component="some", version=1):
                pass
        except RemoteEvalError as error:
            errors.append(error)

    # SQLite refuses one of two that change a new file's mode at once, without a wait: three in a hundred, as seen.
    for attempt in range(150):
        together = threading.Barrier(8)
        threads = [threading.Thread(target=open_it, args=(tmp_path / f"{attempt}", together)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors == []


def test_history_leaves_the_journals_tables_and_version_alone(layout: LocalLayout) -> None:
    layout.data.mkdir(parents=True)
    with sqlite3.connect(layout.database) as connection:
        connection.execute("PRAGMA user_version = 7")
        connection.execute("CREATE TABLE journal_entries (id INTEGER)")
    record_run(layout, finished_run(layout, "a", 1))
    with sqlite3.connect(layout.database) as connection:
        names = {r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert connection.execute("PRAGMA user_version").fetchone() == (7,)
    assert names == {"journal_entries", "history_runs", "history_meta"}


def test_the_file_is_the_users_alone(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "a", 1))
    assert layout.database.stat().st_mode & 0o077 == 0


def test_a_file_of_a_newer_version_is_refused_with_the_fix(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "a", 1))
    with sqlite3.connect(layout.database) as connection:
        connection.execute("UPDATE history_meta SET value = '99'")
    for act in (lambda: list_runs(layout), lambda: rebuild(layout)):
        with pytest.raises(ConfigurationError, match="newer") as caught:
            act()
        assert "Upgrade" in caught.value.action


def test_a_damaged_file_is_named_with_the_way_out(layout: LocalLayout) -> None:
    layout.data.mkdir(parents=True)
    layout.database.write_bytes(b"no database at all, but long enough to look at" * 50)
    with pytest.raises(InternalError) as caught:
        list_runs(layout)
    assert str(layout.database) in str(caught.value)
    assert "rebuild" in caught.value.action


def test_a_failed_migration_leaves_nothing_behind(layout: LocalLayout) -> None:
    with (
        pytest.raises(InternalError),
        open_database(layout.database, "CREATE TABLE x_a (i); NONSENSE", component="x", version=1),
    ):
        pass
    with sqlite3.connect(layout.database) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_an_unreadable_row_does_not_hide_the_others(layout: LocalLayout) -> None:
    record_run(layout, finished_run(layout, "a", 1))
    record_run(layout, finished_run(layout, "b", 2))
    with sqlite3.connect(layout.database) as connection:
        connection.execute("UPDATE history_runs SET row = '{}' WHERE run_id = 'b'")
    assert [r.run_id for r in list_runs(layout)] == ["a"]


def test_rows_survive_the_way_through_json(layout: LocalLayout) -> None:
    documents = {"health": document("health", {"numerics": "fail"}, findings=[finding(), finding("b", "warning")])}
    row = record_run(layout, finished_run(layout, "a", 1, documents=documents))
    assert type(row).from_json(json.loads(json.dumps(row.to_json()))) == row
    assert row.findings == {"values.nan": "error", "b": "warning"}
    assert row.checkpoint_identity == "v1:" + "ef" * 32


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/data", None),
        ("/home/me/runs", "nfs4"),
        ("/home/me/local/runs", None),
        ("/home", "nfs4"),
        ("/homework", None),
        ("/mnt/with space/x", "cifs"),
        ("/mnt/there/x", "fuse.sshfs"),
    ],
)
def test_a_network_file_system_is_known_by_the_longest_mount(folder: str, kind: str | None) -> None:
    assert network_file_system(Path(folder), MOUNTS) == kind
