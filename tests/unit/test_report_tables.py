"""Tables, curves and formatted numbers of the report."""

from __future__ import annotations

import pytest

from orchestrator.report.curves import MAX_POINTS, history_curves
from orchestrator.report.format import bytes_text, cell, command_text, flatten, number_text, seconds_text, words
from orchestrator.report.tables import MAX_ROWS, job_tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (3500188290, "3\u202f500\u202f188\u202f290"),
        (-2, "\u22122"),
        (0.0013, "0.0013"),
        (5.377e-4, "0.0005377"),
        (1.5e-7, "1.5e\u22127"),
        (2.0, "2"),
        (7274496.5, "7.274e6"),
    ],
)
def test_numbers_keep_four_digits_and_whole_ones_all(value: float | int | None, text: str) -> None:
    assert number_text(value) == text


def test_units_and_words_read_as_people_write_them() -> None:
    assert bytes_text(1023) == "1023 bytes"
    assert bytes_text(21_001_537_199) == "19.6 GiB"
    assert [seconds_text(s) for s in (0.04, 59.9, 125, 11400)] == ["0.04 s", "60 s", "2 min 5 s", "3 h 10 min"]
    assert [words(w) for w in ("training_dynamics", "fmri", "psnr_db", "")] == [
        "Training dynamics",
        "fMRI",
        "PSNR db",
        "",
    ]
    assert cell([{"a": 1}, {"a": 2}]) == "2 entries"
    assert cell({"a": [1, None]}) == '{"a": [1, null]}'


def test_a_long_object_says_how_much_of_it_is_not_shown() -> None:
    pairs = flatten({"a": {str(i): i for i in range(10)}}, limit=4)
    assert pairs == [("a.0", "0"), ("a.1", "1"), ("a.2", "2"), ("…", "7 more in results.json")]


def test_the_command_survives_spaces_and_quotes() -> None:
    run = {
        "cluster": "c",
        "checkpoint": "c:it's a $(file).pt",
        "config": None,
        "settings": {"num_samples": 3},
        "jobs": ["health"],
    }
    assert command_text({"run": run}) == (
        "remote-eval --cluster c --checkpoint 'c:it'\"'\"'s a $(file).pt' --num-samples 3 --jobs health"
    )
    assert command_text({"run": run | {"cluster": None}}) is None


def tensor(name: str, role: str = "weight_matrix", **statistics: object) -> dict:
    return {"name": name, "role": role, "shape": [2, 3], "dtype": "bfloat16", "statistics": statistics}


def test_tensors_with_broken_values_stand_before_large_and_constant_ones() -> None:
    tensors = [
        tensor("plain", minimum=-1.0, maximum=1.0, std=0.1),
        tensor("counter", "counter", minimum=9e9, maximum=9e9, std=0),
        tensor("large", minimum=0.0, maximum=7e6, std=3.0),
        tensor("constant", minimum=1.0, maximum=1.0, std=0),
        tensor("infinite", positive_inf=1, negative_inf=2, nan=0),
        {"name": "unread", "statistics": None},
    ]
    (table,) = job_tables("health", {}, {"tensors": tensors})
    assert [row[0] for row in table.rows] == ["infinite", "large", "constant", "plain", "counter", "unread"]
    assert table.rows[0][table.columns.index("Inf")] == "3"
    assert table.rows[0][table.columns.index("Shape")] == "2 × 3"


def test_an_object_of_unlike_objects_becomes_a_table_each() -> None:
    classes = {"counts": {"biases": 48}, "by_role": {"bias": {"n": 1, "nan": 0}, "norm_scale": {"n": 2, "nan": 0}}}
    tables = job_tables("health", {"classes": classes, "device": "cpu"}, {})
    assert [t.title for t in tables] == ["Other facts of health", "Classes: counts", "Classes: by role"]
    assert tables[2].columns == ("Name", "n", "Nan")
    assert tables[2].rows == (("Bias", "1", "0"), ("Norm scale", "2", "0"))


def test_a_table_that_is_cut_says_what_is_missing() -> None:
    (table,) = job_tables("mine", {"rows": [{f"c{i}": i for i in range(14)}] * (MAX_ROWS + 5)}, {})
    assert len(table.rows) == MAX_ROWS
    assert "5 more rows" in table.note
    assert "columns c11, c12, c13" in table.note


def histories(**given: object) -> dict:
    return {"header": {"histories": given}}


def test_a_history_is_drawn_losses_first_with_its_lowest_entry() -> None:
    entries = [{"learning_rate": 0.1, "loss": v} for v in (3.0, 1.0, 2.0)]
    curves = history_curves(histories(val_history=entries))
    assert [c.title for c in curves] == ["Val: loss", "Val: learning rate"]
    assert curves[0].heights == (100, 4, 52)
    assert curves[0].lowest_at == 1
    assert curves[0].summary == "3 entries; lowest 1 at entry 2; last 2"


@pytest.mark.parametrize("count", [1, 2, 59, 60, 61, 5000])
def test_a_long_history_keeps_its_lowest_and_its_last_entry(count: int) -> None:
    entries = [{"loss": abs(i - 7 * count // 11) + 1} for i in range(count)]
    curves = history_curves(histories(h=entries))
    assert len(curves) == (count > 1)
    for curve in curves:
        assert len(curve.heights) <= MAX_POINTS + 2
        assert curve.heights[curve.lowest_at] == 4


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        {"h": 7},
        {"h": [1, 2]},
        {"h": [{"loss": "x"}, {"loss": None}]},
        {"h": [{"loss": 1e308}, {"loss": -1e308}]},
    ],
)
def test_what_is_no_history_is_not_drawn(given: object) -> None:
    assert history_curves({"header": {"histories": given}}) == []


def test_spectra_are_a_table_with_the_largest_norm_first() -> None:
    law = {"alpha": 3.25, "alpha_error": 0.5, "x_min": 0.1, "tail": 20, "distance": 0.1}
    small = {"rows": 8, "columns": 4, "spectral_norm": 1.5, "frobenius_norm": 2.0, "stable_rank": 1.78, "iterations": 9}
    tensors = {
        "a.weight": {**small, "converged": False, "power_law": None},
        "b.weight": {**small, "spectral_norm": 7.5, "iterations": 0, "converged": True, "power_law": law},
    }
    document = {"spectra": {"tensors": tensors, "not_measured": {"c.weight": "it holds values that are not finite"}}}
    (table,) = job_tables("health", document, document)
    assert table.title == "Spectra of the weights"
    assert table.note == "2 of 2 weights, the largest spectral norm first. 1 were not measured."
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(r["Name"], r["Shape"], r["Spectral norm"], r["Alpha"]) for r in rows] == [
        ("b.weight", "8 × 4", "7.5", "3.25"),
        ("a.weight", "8 × 4", "1.5", "—"),
    ]
    assert [r["Found by"] for r in rows] == ["every singular value", "power iteration, not converged"]


@pytest.mark.parametrize("odd", [None, [], {"tensors": 5}, {"tensors": {"a": None}, "not_measured": []}])
def test_odd_spectra_break_no_table(odd: object) -> None:
    assert len(job_tables("health", {"spectra": odd}, {"spectra": odd})) <= 1
