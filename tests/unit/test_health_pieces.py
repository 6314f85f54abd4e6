"""What could not be measured is not passed in silence."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from remote_payload.checkpoint import read_header
from remote_payload.health.blocks import plan_scan
from remote_payload.health.scan import scan
from tests.support.formats import write_fsdp2_checkpoint
from tests.support.hard_values import differing, flat
from tests.support.health_plants import examined


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
    one = folder.with_suffix(".pt")
    dcp_to_torch_save(str(folder), str(one))
    return folder, one


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


def test_pieces_that_are_no_ranges_of_rows_are_said_not_to_be_measured(sharded: tuple[Path, Path]) -> None:
    header = read_header(str(sharded[0]))
    tensor = next(t for t in header.model_tensors() if len(t.pieces) == 2 and len(t.shape) == 2)
    rows, columns = tensor.shape
    turned = dataclasses.replace(
        tensor,
        shape=(columns, rows),
        stride=(rows, 1),
        pieces=tuple(
            dataclasses.replace(p, offsets=p.offsets[::-1], shape=p.shape[::-1], stride=(p.shape[0], 1))
            for p in tensor.pieces
        ),
    )
    changed = dataclasses.replace(header, tensors=tuple(turned if t is tensor else t for t in header.tensors))
    assert plan_scan(changed).not_measured == {tensor.name: "its pieces are no ranges of its rows"}
