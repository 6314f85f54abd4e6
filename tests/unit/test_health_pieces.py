"""What could not be measured is not passed in silence."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.formats import write_fsdp2_checkpoint
from tests.support.health_plants import examined


def test_numerics_do_not_pass_where_a_view_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "overlapping.pt"
    torch.save({"a.weight": torch.randn(200).as_strided((40, 40), (1, 1)), "b.weight": torch.randn(8, 8)}, path)
    verdict = examined(path)["verdict"]
    assert verdict["dimensions"]["numerics"] == "not_measured"
    assert "1 of 2 tensors were not measured" in verdict["reasons"]["numerics"]


def test_numerics_do_not_pass_where_tensors_lie_in_several_pieces(tmp_path: Path) -> None:
    folder = tmp_path / "fsdp2"
    write_fsdp2_checkpoint(folder)
    verdict = examined(folder)["verdict"]
    assert verdict["dimensions"]["numerics"] == "not_measured"
    assert "pieces" in verdict["reasons"]["numerics"]
