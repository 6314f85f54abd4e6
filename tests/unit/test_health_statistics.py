"""What the pass says of a tensor's distribution and rows, against numpy and torch on the whole tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.health.facts import ScanResult
from remote_payload.health.scan import scan
from remote_payload.health.stats import QUANTILES, TensorStats

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def examine(path: Path, document: Any, block_bytes: int | None = None) -> ScanResult:
    torch.save(document, path)
    return scan(read_header(str(path)), "cpu", lambda _done, _total: None, block_bytes)


def stats_of(tmp_path: Path, tensor: torch.Tensor, block_bytes: int | None = None) -> TensorStats:
    return examine(tmp_path / "c.pt", {"layer.weight": tensor}, block_bytes).stats["layer.weight"]


def noise(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(TYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantiles_of_16_bits_are_numpys_inverted_distribution_function(tmp_path: Path, dtype: str) -> None:
    tensor = noise(301, 517, dtype=dtype)
    stats = stats_of(tmp_path, tensor, block_bytes=4096)
    exact = tensor.double().numpy().ravel()
    expected = tuple(np.quantile(exact, QUANTILES, method="inverted_cdf").tolist())
    assert stats.quantiles == expected
    assert stats.quantile_resolution == 0.0


def test_quantiles_of_float32_are_within_their_stated_resolution(tmp_path: Path) -> None:
    tensor = noise(301, 517)
    stats = stats_of(tmp_path, tensor)
    assert stats.quantiles is not None
    assert stats.quantile_resolution is not None
    expected = np.quantile(tensor.double().numpy().ravel(), QUANTILES, method="inverted_cdf")
    for found, exact in zip(stats.quantiles, expected.tolist(), strict=True):
        assert abs(found - exact) <= stats.quantile_resolution * abs(exact)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_kurtosis_is_the_fourth_standardised_moment(tmp_path: Path, dtype: str) -> None:
    tensor = noise(200, 333, dtype=dtype) + 0.5
    exact = tensor.double().numpy()
    centred = exact - exact.mean()
    expected = float((centred**4).mean() / (centred**2).mean() ** 2)
    for block_bytes in (None, 4096):
        assert stats_of(tmp_path, tensor, block_bytes).kurtosis == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_denormal_saturated_and_constant_elements_are_counted_exactly(tmp_path: Path, dtype: str) -> None:
    limits = torch.finfo(TYPES[dtype])
    tensor = torch.full((40, 50), 0.25, dtype=TYPES[dtype])
    tensor[0, :7] = limits.smallest_normal / 2
    tensor[1, :3], tensor[2, :2] = limits.max, -limits.max
    tensor[3, :11], tensor[4, :4], tensor[5, 0] = 0.0, -0.0, 1.0
    stats = stats_of(tmp_path, tensor)
    assert stats.denormal_fraction == 7 / 2000
    assert stats.saturated_fraction == 5 / 2000
    assert stats.zero_fraction == 15 / 2000
    assert stats.one_fraction == 1 / 2000
    assert stats.abs_max == limits.max
    assert stats.over_fp16 == (0 if dtype == "float16" else 5)


def test_the_most_frequent_value_counts_both_zeros_as_one(tmp_path: Path) -> None:
    tensor = noise(64, 64, dtype="bfloat16")
    tensor[:20], tensor[20:40] = 0.0, -0.0
    stats = stats_of(tmp_path, tensor)
    assert (stats.dominant_value, stats.dominant_fraction) == (0.0, 40 / 64)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("block_bytes", [None, 16, 1008])
def test_dead_constant_and_duplicate_rows_are_found_in_any_cut(
    tmp_path: Path, dtype: str, block_bytes: int | None
) -> None:
    tensor = noise(60, 37, dtype=dtype)
    tensor[5], tensor[6, ::2], tensor[6, 1::2] = 0.0, 0.0, -0.0
    tensor[9] = 0.25
    tensor[20], tensor[33], tensor[41] = tensor[3], tensor[3], tensor[8]
    tensor[:, 4] = 0.0
    rows = stats_of(tmp_path, tensor, block_bytes).rows
    assert rows is not None
    assert (rows.dead_rows, rows.first_dead_rows) == (2, (5, 6))
    # Row 9 is 0 in the dead column.
    assert rows.constant_rows == 0
    assert (rows.duplicate_row_groups, rows.duplicate_rows) == (2, 5)
    assert rows.first_duplicate_rows == ((20, 3), (33, 3), (41, 8))
    assert rows.dead_columns == 1
    norms = tensor.double().norm(dim=1)
    assert rows.norm_max == pytest.approx(float(norms.max()), rel=1e-12)
    assert rows.norm_median == pytest.approx(float(np.median(norms.numpy())), rel=1e-12)


def test_a_row_of_one_number_is_constant_and_no_duplicate(tmp_path: Path) -> None:
    tensor = noise(30, 40)
    tensor[4], tensor[7] = 0.5, 0.5
    rows = stats_of(tmp_path, tensor).rows
    assert rows is not None
    assert (rows.constant_rows, rows.duplicate_row_groups, rows.dead_rows) == (2, 0, 0)


def test_permuted_rows_are_no_duplicates(tmp_path: Path) -> None:
    row = noise(1, 64)
    tensor = torch.cat([row[:, torch.randperm(64, generator=torch.Generator().manual_seed(n))] for n in range(50)])
    rows = stats_of(tmp_path, tensor).rows
    assert rows is not None
    assert rows.duplicate_row_groups == 0


def test_a_convolutions_rows_are_its_output_channels(tmp_path: Path) -> None:
    tensor = noise(16, 8, 3, 3)
    tensor[2] = 0.0
    rows = stats_of(tmp_path, tensor).rows
    assert rows is not None
    assert (rows.rows, rows.columns, rows.dead_rows, rows.dead_columns) == (16, 72, 1, None)


def test_a_fresh_layer_is_at_its_own_initialisation_and_no_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256)
    found = {d.scheme: d for d in stats_of(tmp_path, linear.weight.detach()).init}
    own, other = found["kaiming_uniform_a5_fan_in"], found["kaiming_normal_fan_in"]
    assert own.std_ratio == pytest.approx(1.0, abs=0.01)
    assert own.shape_distance < 0.01 < 0.05 < other.shape_distance
    torch.nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    found = {d.scheme: d for d in stats_of(tmp_path, linear.weight.detach()).init}
    assert found["kaiming_normal_fan_out"].std_ratio == pytest.approx(1.0, abs=0.01)
    assert found["kaiming_normal_fan_out"].shape_distance < 0.01
    assert abs(math.log(found["kaiming_normal_fan_in"].std_ratio)) > 0.3


def test_the_same_file_gives_the_same_numbers(tmp_path: Path) -> None:
    document = {"layer.weight": noise(500, 700), "half.weight": noise(500, 700, dtype="bfloat16")}
    assert examine(tmp_path / "c.pt", document) == examine(tmp_path / "c.pt", document)
