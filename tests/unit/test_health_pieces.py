"""What could not be measured is not passed in silence."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.health.blocks import plan_scan
from remote_payload.health.scan import scan
from tests.support.formats import deepspeed_run, in_one_file, write_deepspeed_checkpoint, write_fsdp2_checkpoint
from tests.support.hard_values import differing, flat
from tests.support.health_plants import examined, findings_of


def test_numerics_do_not_pass_where_a_view_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pt"
    torch.save({"a.weight": torch.randn(200).as_strided((40, 40), (1, 1)), "b.weight": torch.randn(8, 8)}, path)
    verdict = examined(path)["verdict"]
    assert verdict["dimensions"]["numerics"] == "not_measured"
    assert "1 of 2 tensors were not measured" in verdict["reasons"]["numerics"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What two ranks of FSDP2 saved, and the same tensors in one file."""
    folder = tmp_path_factory.mktemp("pieces") / "fsdp2"
    write_fsdp2_checkpoint(folder)
    header = read_header(str(folder))
    assert any(len(t.pieces) == 2 for t in header.tensors)
    return folder, in_one_file(folder)


@pytest.mark.parametrize("block_bytes", [None, 16, 48])
@pytest.mark.parametrize("by_native", [False, True])
def test_a_tensor_in_pieces_has_the_numbers_that_it_has_in_one(
    sharded: tuple[Path, Path], block_bytes: int | None, by_native: bool
) -> None:
    in_pieces, in_one = (
        scan(read_header(str(path)), "cpu", lambda _done, _total: None, block_bytes, by_native) for path in sharded
    )
    assert in_pieces.not_measured == {}
    assert len(flat(dataclasses.asdict(in_one)["stats"])) > 100
    for part in ("stats", "joint"):
        assert differing(dataclasses.asdict(in_pieces)[part], dataclasses.asdict(in_one)[part], 1e-12) == []
    assert in_pieces.joint.keys() == in_one.joint.keys()
    assert len(in_pieces.joint) == 6


def test_the_first_bad_elements_are_found_in_whichever_piece_they_lie(
    sharded: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded[0], tmp_path / "fsdp2"))
    tensor = next(t for t in read_header(str(folder)).model_tensors() if len(t.pieces) == 2 and t.shape == (5, 6))
    second = tensor.pieces[1]
    path = Path(read_header(str(folder)).files[second.file].path)
    data = bytearray(path.read_bytes())
    data[second.file_offset + 4 : second.file_offset + 8] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    result = scan(read_header(str(folder)), "cpu", lambda _done, _total: None)
    assert result.stats[tensor.name].first_nan == ((second.offsets[0], 1),)
    assert len(result.checksums.mismatches) == 1


def test_a_piece_that_cannot_be_read_takes_its_tensor_with_it(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded[0], tmp_path / "fsdp2"))
    header = read_header(str(folder))
    tensor = next(t for t in header.model_tensors() if len(t.pieces) == 2)
    last = max(tensor.pieces, key=lambda p: p.file)
    os.truncate(header.files[last.file].path, last.file_offset + 1)
    result = scan(header, "cpu", lambda _done, _total: None)
    assert tensor.name not in result.stats
    assert "became shorter" in result.not_measured[tensor.name]


@pytest.fixture(scope="module")
def by_columns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What two ranks of tensor parallelism saved, each some columns of the matrices, and the same in one file."""
    folder = tmp_path_factory.mktemp("columns") / "tensor_parallel"
    write_fsdp2_checkpoint(folder, columns=True)
    return folder, in_one_file(folder)


@pytest.mark.parametrize("block_bytes", [None, 16, 48])
@pytest.mark.parametrize("by_native", [False, True])
def test_a_matrix_cut_by_columns_has_all_its_numbers_but_those_of_its_rows(
    by_columns: tuple[Path, Path], block_bytes: int | None, by_native: bool
) -> None:
    in_pieces, in_one = (
        scan(read_header(str(path)), "cpu", lambda _done, _total: None, block_bytes, by_native) for path in by_columns
    )
    assert in_pieces.not_measured == {}
    assert in_pieces.stats["0.weight"].rows is None
    assert in_one.stats["0.weight"].rows is not None
    for result in (in_pieces, in_one):
        for name, stats in result.stats.items():
            result.stats[name] = dataclasses.replace(stats, rows=None)
    for part in ("stats", "joint"):
        assert differing(dataclasses.asdict(in_pieces)[part], dataclasses.asdict(in_one)[part], 1e-12) == []
    assert in_pieces.joint.keys() == in_one.joint.keys()
    assert len(in_pieces.joint) == 6


def test_a_matrix_cut_by_columns_says_that_its_rows_were_not_measured(by_columns: tuple[Path, Path]) -> None:
    reasons = {t["name"]: t["rows_not_measured"] for t in examined(by_columns[0])["tensors"]}
    assert reasons["0.weight"] == reasons["2.weight"] == "its pieces are no ranges of its rows"
    assert reasons["0.bias"] is None


def test_a_bad_element_of_a_matrix_cut_by_columns_is_found_where_it_is(
    by_columns: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(by_columns[0], tmp_path / "tensor_parallel"))
    header = read_header(str(folder))
    second = header.tensor("0.weight").pieces[1]
    path = Path(header.files[second.file].path)
    data = bytearray(path.read_bytes())
    data[second.file_offset + 16 : second.file_offset + 20] = struct.pack("<f", float("nan"))
    path.write_bytes(data)
    result = scan(read_header(str(folder)), "cpu", lambda _done, _total: None)
    assert result.stats["0.weight"].first_nan == ((1, 4),), "element 4 of 3 columns from column 3 on"


def test_moments_that_are_cut_otherwise_are_not_read_with_their_parameter(by_columns: tuple[Path, Path]) -> None:
    header = read_header(str(by_columns[0]))
    moment = header.tensor("optim/state/0.weight/exp_avg")
    rows = tuple(
        dataclasses.replace(p, offsets=(0, 0) if n == 0 else (2, 3), shape=p.shape) for n, p in enumerate(moment.pieces)
    )
    other = dataclasses.replace(moment, pieces=rows)
    changed = dataclasses.replace(header, tensors=tuple(other if t is moment else t for t in header.tensors))
    plan = plan_scan(changed)
    assert plan.joint_not_measured == {"0.weight": "its pieces are not cut as those of its moments are"}


@pytest.mark.parametrize("block_bytes", [None, 16, 48])
def test_zero_3_puts_together_what_one_file_would_say(tmp_path: Path, block_bytes: int | None) -> None:
    write_deepspeed_checkpoint(tmp_path / "run", stage=3, ranks=3)
    masters, _ = deepspeed_run()
    torch.save({"model": masters}, tmp_path / "one.pt")
    in_ranks, in_one = (
        scan(read_header(str(tmp_path / name)), "cpu", lambda _done, _total: None, block_bytes)
        for name in ("run", "one.pt")
    )
    assert in_ranks.not_measured == {}
    for name, stats in in_one.stats.items():
        found, expected = dataclasses.asdict(in_ranks.stats[name]), dataclasses.asdict(stats)
        assert differing(found, expected, 1e-12) == []
    assert any(s.rows for s in in_one.stats.values())
    assert len(in_ranks.joint) + len(in_ranks.joint_not_measured) == len(masters)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_healthy_run_of_zero_raises_no_alarm_and_a_dead_layer_does(tmp_path: Path, stage: int) -> None:
    write_deepspeed_checkpoint(tmp_path / "run", stage)
    document = examined(tmp_path / "run")
    assert [(f["id"], f["title"]) for f in document["findings"] if f["severity"] != "info"] == []
    for path in (tmp_path / "run").rglob("*_optim_states.pt"):
        partition = torch.load(path, weights_only=True)
        inner = partition["optimizer_state_dict"]["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        inner["state"][0]["exp_avg_sq"].zero_()
        torch.save(partition, path)
    found = findings_of(examined(tmp_path / "run"), "optimizer.zero_gradient")
    assert [f["severity"] for f in found] == ["error"]
    weights = {n.removeprefix("module.") for n in deepspeed_run()[0]}
    assert set(found[0]["where"]) == weights
