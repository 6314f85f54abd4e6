"""The tick: evaluates what is new, lets no target stop another, and its exit code can be relied on."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

import pytest

from orchestrator.errors import (
    CheckpointError,
    ConfigurationError,
    ExitCode,
    IntegrityError,
    LockedError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.layout import LocalLayout
from orchestrator.nightly import Target, TargetOutcome, load_targets, newest_match, tick
from orchestrator.nightly.tick import TargetResult, exit_code


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


class Lab:
    """Targets' checkpoints and what evaluating them comes to."""

    def __init__(self) -> None:
        self.identities: dict[str, str | Exception] = {}
        self.outcomes: dict[str, TargetOutcome | Exception] = {}
        self.evaluated: list[str] = []

    def identity(self, target: Target) -> str:
        found = self.identities.get(target.name, "v1:same")
        if isinstance(found, Exception):
            raise found
        return found

    def run(self, target: Target) -> TargetOutcome:
        self.evaluated.append(target.name)
        outcome = self.outcomes.get(target.name, TargetOutcome(f"run-{target.name}", "pass"))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def targets(*names: str) -> list[Target]:
    return [Target(name=n, checkpoint=f"c:{n}.pt", cluster="c") for n in names]


def test_an_unchanged_checkpoint_is_evaluated_once(layout: LocalLayout) -> None:
    lab = Lab()
    first = tick(layout, targets("a"), lab.run, lab.identity)
    second = tick(layout, targets("a"), lab.run, lab.identity)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert [t.status for t in (*first.targets, *second.targets)] == ["evaluated", "unchanged"]
    assert second.targets[0].run_id == "run-a"
    lab.identities["a"] = "v1:new"
    assert tick(layout, targets("a"), lab.run, lab.identity).targets[0].status == "evaluated"
    assert lab.evaluated == ["a", "a"]


def test_an_edited_target_is_evaluated_anew_and_a_reordered_file_is_not(layout: LocalLayout) -> None:
    lab = Lab()
    tick(layout, targets("a", "b"), lab.run, lab.identity)
    edited = [t.model_copy(update={"num_samples": 9}) if t.name == "a" else t for t in targets("b", "a")]
    tick(layout, edited, lab.run, lab.identity)
    assert lab.evaluated == ["a", "b", "a"]


def test_one_targets_failure_stops_no_other_and_is_tried_again(layout: LocalLayout) -> None:
    lab = Lab()
    lab.outcomes = {"a": UnreachableError("no answer", action="wait"), "b": ZeroDivisionError("ours")}
    lab.identities = {"c": CheckpointError("no file matches")}
    summary = tick(layout, targets("a", "b", "c", "d"), lab.run, lab.identity)
    assert [t.status for t in summary.targets] == ["error", "error", "error", "evaluated"]
    assert summary.exit_code == ExitCode.INTERNAL
    lab.outcomes, lab.identities = {}, {}
    assert tick(layout, targets("a", "b", "c", "d"), lab.run, lab.identity).exit_code == 0
    assert lab.evaluated == ["a", "b", "d", "a", "b", "c"]


def test_an_interrupt_ends_the_tick_and_forgets_nothing(layout: LocalLayout) -> None:
    lab = Lab()

    def interrupted(target: Target) -> TargetOutcome:
        if target.name == "b":
            raise KeyboardInterrupt
        return lab.run(target)

    with pytest.raises(KeyboardInterrupt):
        tick(layout, targets("a", "b"), interrupted, lab.identity)
    assert [t.status for t in tick(layout, targets("a", "b"), lab.run, lab.identity).targets] == [
        "unchanged",
        "evaluated",
    ]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (TargetOutcome("r", "pass"), 0),
        (TargetOutcome("r", "warn"), 0),
        (TargetOutcome("r", "fail"), 1),
        (TargetOutcome("r", "not_measured"), 1),
        (TargetOutcome("r", "pass", ("ssim worse",)), 1),
        (IntegrityError("x"), 7),
        (UnreachableError("x"), 4),
    ],
)
def test_the_exit_code_follows_the_outcome_and_stands_while_the_checkpoint_does(
    layout: LocalLayout, outcome: TargetOutcome | RemoteEvalError, code: int
) -> None:
    lab = Lab()
    lab.outcomes["a"] = outcome
    assert tick(layout, targets("a"), lab.run, lab.identity).exit_code == code
    assert tick(layout, targets("a"), lab.run, lab.identity).exit_code == code


def test_a_bad_verdict_outranks_errors_and_errors_have_one_order() -> None:
    errors = [ExitCode.INTERNAL, ExitCode.INTEGRITY, ExitCode.JOB_FAILED, ExitCode.NODE_UNFIT]
    errors += [ExitCode.AUTHENTICATION, ExitCode.USAGE, ExitCode.UNREACHABLE, ExitCode.DEFERRED]
    for codes in itertools.permutations(errors, 2):
        results = [TargetResult("t", "error", int(c)) for c in codes]
        assert exit_code(results) == min(codes, key=errors.index)
        assert exit_code([*results, TargetResult("t", "evaluated", 1)]) == 1
    assert exit_code([]) == 0


def test_a_second_tick_is_refused_while_one_is_at_it(layout: LocalLayout) -> None:
    layout.data.mkdir(parents=True)
    held = os.open(layout.nightly_lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LockedError) as caught:
            tick(layout, targets("a"), Lab().run, Lab().identity)
    finally:
        os.close(held)
    assert caught.value.exit_code == 75
    assert tick(layout, targets("a"), Lab().run, Lab().identity).exit_code == 0


def test_the_summary_says_everything_in_text_and_json(layout: LocalLayout) -> None:
    lab = Lab()
    lab.outcomes = {
        "a": TargetOutcome("run-a", "fail", ("numerics: pass, now fail",), "/r/report.html"),
        "b": UnreachableError("no \x1b[31manswer", action="wait"),
    }
    summary = tick(layout, targets("a", "b"), lab.run, lab.identity)
    text = summary.to_text()
    assert "FAIL" in text
    assert "/r/report.html" in text
    assert "worse: numerics: pass, now fail" in text
    assert "next: wait" in text
    assert "\x1b" not in text
    assert text.endswith("2 targets: 1 evaluated, 0 unchanged, 1 with errors; 1 failing, worse or not measured\n")
    assert [t["status"] for t in summary.to_json()["targets"]] == ["evaluated", "error"]


def write(folder: Path, text: str) -> Path:
    path = folder / "nightly.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_targets_project_is_the_files_own_folder_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, "targets:\n- {name: a, checkpoint: x.pt}\n- {name: b, checkpoint: y.pt, project: sub}\n")
    file = load_targets(path)
    assert [t.project for t in file.targets] == [str(tmp_path), str(tmp_path / "sub")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("targets:\n- name: a\n  checkpoint: x\n  chekpoint: y\n", "nightly.yaml:4: field 'targets.0.chekpoint'"),
        ("targets: []\n", "targets"),
        ("targets:\n- {name: a, checkpoint: x}\n- {name: a, checkpoint: y}\n", "two targets are named 'a'"),
        ("targets:\n- {name: ../a, checkpoint: x}\n", "targets.0.name"),
        ("targets:\n- {name: a, checkpoint: x, num_samples: -1}\n", "num_samples"),
        ("- a\n", "expected fields"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_targets(write(tmp_path, text))
    assert words in str(caught.value)


def test_a_pattern_names_the_file_changed_last(tmp_path: Path) -> None:
    for name, changed in (("epoch2.pt", 30), ("epoch10.pt", 20), ("epoch11.pt", 30), ("other.txt", 99)):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (changed, changed))
    (tmp_path / "epoch99.pt").mkdir()
    assert newest_match("epoch*.pt", tmp_path).name == "epoch2.pt"
    assert newest_match(str(tmp_path / "epoch1?.pt"), Path("/")).name == "epoch11.pt"
    with pytest.raises(CheckpointError):
        newest_match("nothing*.pt", tmp_path)
