"""The streaming pass: its numbers against torch's, its checksums, its bounds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from remote_payload.checkpoint import CheckpointHeader, read_header
from remote_payload.health.blocks import MAX_OVERLAP, iter_blocks, plan_scan
from remote_payload.health.crc import crc32_join
from remote_payload.health.facts import ScanResult
from remote_payload.health.scan import scan
from remote_payload.health.stats import TensorStats
from tests.support.checkpoints import tensor_pickle, trained_small_checkpoint

FLOATS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def scanned(path: Path, block_bytes: int | None = None) -> tuple[CheckpointHeader, ScanResult]:
    header = read_header(path)
    return header, scan(header, "cpu", lambda done, total: None, block_bytes)


def stats_of(tmp_path: Path, tensor: torch.Tensor, block_bytes: int | None = None) -> TensorStats:
    path = tmp_path / "c.pt"
    torch.save({"w": tensor}, path)
    return scanned(path, block_bytes)[1].stats["w"]


def assert_agrees(stats: TensorStats, tensor: torch.Tensor) -> None:
    exact = tensor.to(torch.float64).flatten()
    finite = exact[torch.isfinite(exact)]
    assert stats.count == exact.numel()
    assert stats.nan == int(torch.isnan(exact).sum())
    assert (stats.positive_inf, stats.negative_inf) == (int((exact == math.inf).sum()), int((exact == -math.inf).sum()))
    assert (stats.minimum, stats.maximum) == (float(finite.min()), float(finite.max()))
    assert stats.mean == pytest.approx(float(finite.mean()), rel=1e-12, abs=1e-15)
    assert stats.std == pytest.approx(float(finite.std()), rel=1e-10, abs=1e-15)
    assert stats.zero_fraction == float((finite == 0).sum()) / finite.numel()
    assert stats.one_fraction == float((finite == 1).sum()) / finite.numel()


@pytest.mark.parametrize("block_bytes", [1 << 14, 1 << 20])
@pytest.mark.parametrize("count", [7, 70_000, 600_001])
@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_are_torchs_in_float64(tmp_path: Path, dtype: str, count: int, block_bytes: int) -> None:
    torch.manual_seed(1)
    tensor = (torch.randn(count) * 3 + 1).to(getattr(torch, dtype))
    assert_agrees(stats_of(tmp_path, tensor, block_bytes), tensor)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_statistics_of_integers(tmp_path: Path, dtype: str) -> None:
    tensor = torch.randint(0, 2 if dtype == "bool" else 100, (5000,)).to(getattr(torch, dtype))
    assert_agrees(stats_of(tmp_path, tensor), tensor)


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_a_large_mean_does_not_swallow_a_small_spread(tmp_path: Path, dtype: str) -> None:
    tensor = (1e4 + 64 * torch.randn(200_000, dtype=torch.float64)).to(getattr(torch, dtype))
    assert_agrees(stats_of(tmp_path, tensor, 1 << 14), tensor)


def test_a_constant_has_no_spread(tmp_path: Path) -> None:
    for dtype in FLOATS[:4]:
        stats = stats_of(tmp_path, torch.full((100_003,), 0.1).to(getattr(torch, dtype)), 1 << 14)
        assert stats.is_constant
        assert stats.std == 0
        assert stats.mean == stats.minimum


@pytest.mark.parametrize("count", [1000, 200_000])
@pytest.mark.parametrize("dtype", FLOATS[:5])
def test_bad_values_are_counted_and_located(tmp_path: Path, dtype: str, count: int) -> None:
    tensor = torch.ones(count // 100, 100)
    places = [(0, 0), (3, 7), (3, 8), (9, 99)]
    for place in places:
        tensor[place] = math.nan
    has_inf = dtype != "float8_e4m3fn"
    if has_inf:
        tensor[5, 5], tensor[6, 6] = math.inf, -math.inf
    stats = stats_of(tmp_path, tensor.to(getattr(torch, dtype)), 1 << 12)
    assert stats.nan == 4
    assert stats.first_nan == tuple(places)
    assert stats.first_inf == (((5, 5), (6, 6)) if has_inf else ())
    assert (stats.minimum, stats.maximum, stats.mean) == (1, 1, 1)


def test_a_bad_value_in_a_transposed_tensor_has_the_tensors_own_index(tmp_path: Path) -> None:
    tensor = torch.zeros(30, 40, 5)
    tensor[17, 3, 2] = math.nan
    stats = stats_of(tmp_path, tensor.permute(2, 0, 1))
    assert stats.first_nan == ((2, 17, 3),)


def test_a_tensor_of_nothing_finite_has_no_mean(tmp_path: Path) -> None:
    for count in (10, 100_000):
        for dtype in (torch.float32, torch.bfloat16):
            stats = stats_of(tmp_path, torch.full((count,), math.nan, dtype=dtype))
            assert (stats.nan, stats.mean, stats.std, stats.minimum, stats.zero_fraction) == (
                count,
                None,
                None,
                None,
                None,
            )
            assert not stats.is_constant
            json.dumps(stats.to_json(), allow_nan=False)


def test_float64_extremes_give_no_infinity_in_the_document(tmp_path: Path) -> None:
    stats = stats_of(tmp_path, torch.tensor([1.7e308, -1.7e308, 1.7e308], dtype=torch.float64))
    json.dumps(stats.to_json(), allow_nan=False)


def test_strided_views_and_shared_storages_are_measured(tmp_path: Path) -> None:
    base = torch.randn(50, 60)
    base[2, 4] = math.nan
    views = {"base": base, "again": base, "columns": base[:, ::3], "row": base[2], "wide": base[:1].expand(9, 60)}
    path = tmp_path / "c.pt"
    torch.save(views, path)
    _, result = scanned(path)
    assert result.not_measured == {}
    assert result.stats["base"] == result.stats["again"]
    assert result.stats["row"].first_nan == ((4,),)
    assert_agrees(result.stats["base"], base)
    assert_agrees(result.stats["columns"], base[:, ::3])
    # An expanded view has its distinct elements measured once.
    assert_agrees(result.stats["wide"], base[0])


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(
        {"w": torch.arange(9.0).unfold(0, 5, 1), "e": torch.empty(0, 3), "u": torch.ones(3).to(torch.uint16)}, path
    )
    _, result = scanned(path)
    assert set(result.not_measured) == {"w", "e", "u"}
    assert "overlap" in result.not_measured["w"]


@settings(max_examples=200, deadline=None)
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_joined_checksums_are_the_wholes(first: bytes, second: bytes) -> None:
    assert crc32_join(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_a_flipped_bit_in_any_record_is_found_and_named(tmp_path: Path) -> None:
    path, flipped = tmp_path / "c.pt", tmp_path / "f.pt"
    torch.save(trained_small_checkpoint(), path)
    data = path.read_bytes()
    header, clean = scanned(path)
    assert clean.checksums.mismatches == ()
    assert clean.checksums.checked == len(header.records)
    for record in header.records:
        if not record.name.partition("/")[2].startswith("data/") or not record.size:
            continue
        damaged = bytearray(data)
        damaged[record.offset + record.size // 2] ^= 0x10
        flipped.write_bytes(damaged)
        _, result = scanned(flipped, 64)
        assert [m.record for m in result.checksums.mismatches] == [record.name]


def test_a_record_without_checksum_is_counted_as_such(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, path)
    _, result = scanned(path)
    assert (result.checksums.checked, result.checksums.without) == (0, 2)
    assert_agrees(result.stats["a"], torch.ones(4))


@pytest.mark.parametrize("block_bytes", [1024, 65536, 1 << 23])
def test_the_block_size_changes_no_number(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "c.pt"
    torch.manual_seed(2)
    torch.save({"a": torch.randn(999).bfloat16(), "b": torch.randn(70_001).half(), "n": torch.arange(5)}, path)
    usual = scanned(path)[1]
    other = scanned(path, block_bytes)[1]
    assert other.checksums == usual.checksums
    assert other.stats["b"] == usual.stats["b"]
    for name in usual.stats:
        assert other.stats[name].mean == pytest.approx(usual.stats[name].mean, rel=1e-12)


def test_thousands_of_views_over_one_storage_stay_cheap(tmp_path: Path) -> None:
    base = torch.zeros(200_000, dtype=torch.bfloat16)
    path = tmp_path / "c.pt"
    torch.save({f"v{i}": base[i : i + 150_000] for i in range(3000)}, path)
    header = read_header(path)
    plan = plan_scan(header)
    assert len(plan.groups) == MAX_OVERLAP
    assert len(plan.not_measured) == 3000 - MAX_OVERLAP
    assert sum(b.length for b in iter_blocks(header, plan, 1 << 16)) == sum(r.size for r in header.records)


def test_overlapping_records_are_read_once(tmp_path: Path) -> None:
    # Each of the 200 entries of the directory points at the same megabyte.
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(numel=1 << 18, shape=(1 << 18,)))
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist.extend([archive.getinfo("archive/data/0")] * 200)
    path = tmp_path / "c.pt"
    path.write_bytes(buffer.getvalue())
    header, result = scanned(path)
    assert result.bytes_read <= path.stat().st_size
    assert any(p.id == "integrity.record_overlap" for p in header.problems)


def test_a_file_that_shrinks_while_it_is_read_gives_errors_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({f"w{i}": torch.ones(50_000) for i in range(40)}, path)
    header = read_header(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    result = scan(header, "cpu", lambda done, total: None)
    assert result.read_errors
    assert 0 < len(result.stats) < 40
    assert len(result.stats) + len(result.not_measured) == 40


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), path)
    header = read_header(path)
    seen: list[tuple[int, int]] = []
    scan(header, "cpu", lambda done, total: seen.append((done, total)), 64)
    total = sum(r.size for r in header.records)
    assert seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from remote_payload.checkpoint import read_header;"
        "from remote_payload.health.scan import scan;"
        "scan(read_header(sys.argv[1]), 'cpu', lambda d, t: None);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks: list[int] = []
    for elements in (1 << 10, 1 << 28):
        path = tmp_path / f"{elements}.pt"
        write_zero_checkpoint(path, elements)
        result = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=200, check=True
        )
        peaks.append(int(result.stdout))
    assert peaks[1] - peaks[0] < 200 * 1024, peaks


def write_zero_checkpoint(path: Path, elements: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        document: dict[str, Any] = {"w": torch.empty(elements, dtype=torch.bfloat16)}
        torch.save(document, path)


def test_a_cpu_scan_leaves_torchs_thread_count_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        stats_of(tmp_path, torch.ones(3))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_shards_are_scanned_file_by_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    _, result = scanned(tmp_path)
    assert result.stats["a"].one_fraction == 1
    assert result.stats["b"].zero_fraction == 1
