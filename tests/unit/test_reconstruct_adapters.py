from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from remote_payload.reconstruct.adapters import AdapterCallError, calling, resolve_adapter
from remote_payload.reconstruct.protocol import (
    AdapterError,
    Kind,
    Modality,
    Sample,
    VoxelPlaces,
    call_checked,
    modality_problem,
    stack_inputs,
)
from remote_payload.reconstruct.ranges import check_shape, non_finite_finding, prediction_finding, target_finding


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_reference_adapter_is_found_by_name() -> None:
    adapter = resolve_adapter("remote_payload.reference.adapter:ReferenceAdapter")
    assert adapter.data_names == ("film",)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "module:Class"),
        ("no_such_module_here:A", "no module"),
        ("remote_payload.reference.adapter:Nothing", "no class"),
        ("json:JSONDecoder", "is no adapter"),
    ],
)
def test_a_wrong_name_is_told_in_a_sentence(name: str, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        resolve_adapter(name)


def test_a_module_that_cannot_be_imported_is_told_apart_from_one_that_is_missing(code: Path) -> None:
    (code / "broken_adapter.py").write_text("import module_that_is_not_installed\n")
    with pytest.raises(AdapterCallError, match="module_that_is_not_installed"):
        resolve_adapter("broken_adapter:A")


def test_what_the_adapter_raises_is_told_with_the_method_and_without_escapes() -> None:
    with pytest.raises(AdapterCallError) as caught, calling("predict"):
        raise KeyError("\x1b[31mred")
    assert caught.value.method == "predict"
    assert "KeyError" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert Path(__file__).name in caught.value.raised_at


def test_running_out_of_memory_passes_through() -> None:
    with pytest.raises(MemoryError), calling("predict"):
        raise MemoryError


def test_a_call_with_an_argument_that_is_not_taken_names_what_is_taken() -> None:
    def dataset(root: str, split: str) -> None: ...

    with pytest.raises(AdapterError, match=r"root: .*split: .*mode"):
        call_checked(dataset, root="x", split="test", mode="val")


def test_inputs_of_different_shapes_are_not_stacked_by_guessing() -> None:
    samples = [Sample("a", {"x": np.zeros(3)}, {}), Sample("b", {"x": np.zeros(4)}, {})]
    with pytest.raises(AdapterError, match="different shapes"):
        stack_inputs(samples)


@pytest.mark.parametrize(
    ("modality", "told"),
    [
        (Modality("m", Kind.IMAGE, "WH", (2, 2), None, "u"), "layout"),
        (Modality("m", Kind.IMAGE, "HWC", (2, 2), None, "u"), "axes"),
        (Modality("m", Kind.IMAGE, "HW", (2, 0), None, "u"), "empty"),
        (Modality("m", Kind.IMAGE, "HW", (2, 2), (1.0, 1.0), "u"), "range"),
        (Modality("m", Kind.CODES, "KT", (2, 2), None, "u"), "range"),
        (Modality("m", Kind.VOXELS, "V", (2,), None, "u", places=VoxelPlaces((1, 1, 1), np.zeros((3, 3)))), "places"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(modality: Modality, told: str) -> None:
    assert told in (modality_problem(modality) or "")


IMAGE = Modality("image", Kind.IMAGE, "HW", (4, 4), (0.0, 255.0), "intensity")


def values(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 32, dtype=np.float32).reshape(2, 4, 4)


def test_a_sigmoid_head_against_bytes_is_a_range_mismatch() -> None:
    found = prediction_finding(IMAGE, values(0, 255), values(0, 1))
    assert found is not None
    assert found.id == "reconstruct.range_mismatch"


def test_bytes_against_targets_in_zero_to_one_are_a_range_mismatch() -> None:
    unit = Modality("image", Kind.IMAGE, "HW", (4, 4), (0.0, 1.0), "intensity")
    found = prediction_finding(unit, values(0, 1), values(0, 255))
    assert found is not None
    assert found.id == "reconstruct.range_mismatch"


def test_targets_outside_of_the_declared_range_are_a_range_mismatch() -> None:
    unit = Modality("image", Kind.IMAGE, "HW", (4, 4), (0.0, 1.0), "intensity")
    found = target_finding(unit, values(0, 255))
    assert found is not None
    assert found.id == "reconstruct.range_mismatch"
    assert found.evidence["targets"] == [0.0, 255.0]


def test_a_dark_picture_within_the_range_is_no_mismatch() -> None:
    assert target_finding(IMAGE, values(0, 3)) is None
    assert prediction_finding(IMAGE, values(0, 255), values(20, 90)) is None


def test_an_overshoot_is_a_warning_and_still_scored() -> None:
    found = prediction_finding(IMAGE, values(0, 255), values(-200, 255))
    assert found is not None
    assert (found.id, found.severity.value) == ("reconstruct.out_of_range", "warning")


def test_nan_in_targets_and_in_predictions_are_told_apart() -> None:
    broken = values(0, 255)
    broken[0, 0, 0] = np.nan
    target, output = target_finding(IMAGE, broken), non_finite_finding(IMAGE, broken)
    assert target is not None
    assert target.id == "reconstruct.range_mismatch"
    assert output is not None
    assert output.evidence["samples"] == 1


def test_a_shape_is_never_guessed() -> None:
    with pytest.raises(AdapterError, match=r"\(2, 16\).*declared is \(2, 4, 4\).*NHW"):
        check_shape("prediction", IMAGE, np.zeros((2, 16)), 2)
