"""The compiled kernels against the ones in torch and numpy: the same document from either."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from remote_payload.checkpoint import read_header
from remote_payload.health import native
from remote_payload.health.kept import CACHE_VARIABLE, MOST_KEPT, forget_old, read_kept, write_kept
from remote_payload.health.native import NativeKernels, find_native, load_native
from remote_payload.health.scan import scan
from tests.support.hard_values import differing, flat, hard_checkpoint
from tests.support.health_plants import examined


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    found = load_native()
    assert found is not None, "this machine has a compiler"
    return found


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What `load_native` found for other tests is not found again for this one, nor this one's for them."""
    find_native.cache_clear()
    yield
    find_native.cache_clear()


def differences(path: Path, block_bytes: int | None) -> list[tuple[str, Any, Any]]:
    header = read_header(str(path))
    results = [scan(header, "cpu", lambda _done, _total: None, block_bytes, by_native) for by_native in (False, True)]
    assert [r.native is not None and r.native.used for r in results] == [False, True]
    by_torch, compiled = (dataclasses.asdict(dataclasses.replace(r, native=None)) for r in results)
    assert len(flat(by_torch)) > 100
    return differing(by_torch, compiled, 1e-11)


@pytest.mark.parametrize("block_bytes", [None, 1 << 20, 96])
def test_both_kernels_say_the_same_of_every_hard_value(
    kernels: NativeKernels, tmp_path: Path, block_bytes: int | None
) -> None:
    path = tmp_path / "hard.pt"
    document = hard_checkpoint()
    if block_bytes == 96:
        document["model_state_dict"] = {k: v[:40, :40] for k, v in list(document["model_state_dict"].items())[:18]}
        del document["optimizer_state_dict"]
    torch.save(document, path)
    assert differences(path, block_bytes) == []


def test_the_plainest_instructions_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setattr(native, "_NATIVE", ())
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "hard.pt"
    torch.save(hard_checkpoint(), path)
    assert differences(path, None) == []
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_both_kernels_say_the_same_where_many_tensors_share_one_record(kernels: NativeKernels, tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    save_file({k: v.clone() for k, v in hard_checkpoint()["model_state_dict"].items()}, path)
    assert differences(path, None) == []
    assert differences(path, 1 << 16) == []


def test_both_kernels_say_the_same_of_overlapping_views(kernels: NativeKernels, tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    base = torch.randn(700, 300)
    torch.save({"state_dict": {"a.weight": base, "b.weight": base[100:], "c.weight": base[:200], "d": base[5]}}, path)
    assert differences(path, None) == []


def test_a_flipped_bit_is_a_wrong_checksum_by_the_compiled_kernels_too(kernels: NativeKernels, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"state_dict": {"a.weight": torch.randn(300, 300), "b.weight": torch.randn(300, 300)}}, path)
    tensor = read_header(str(path)).tensor("b.weight")
    data = bytearray(path.read_bytes())
    data[(tensor.file_offset or 0) + 12345] ^= 0x10
    path.write_bytes(data)
    header = read_header(str(path))
    assert len(scan(header, "cpu", lambda _d, _t: None, None, True).checksums.mismatches) == 1


def test_a_file_that_became_shorter_is_an_error_of_its_record(kernels: NativeKernels, tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    torch.save({"state_dict": {"a.weight": torch.randn(300, 300), "b.weight": torch.randn(300, 300)}}, path)
    header = read_header(str(path))
    os.truncate(path, (header.tensor("b.weight").file_offset or 0) + 1000)
    result = scan(header, "cpu", lambda _d, _t: None, None, True)
    assert set(result.stats) == {"a.weight"}
    assert any("became shorter" in reason for reason in result.read_errors.values())


@pytest.mark.parametrize(
    "length", [0, 1, 7, 8, 63, 64, 127, 128, 129, 191, 192, 255, 256, 257, 383, 384, 1000, 65536, 100_003]
)
def test_the_checksum_is_zlibs(kernels: NativeKernels, length: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length + 3, dtype=np.uint8)
    for start in range(3):
        assert kernels.checksum(data[start : start + length]) == zlib.crc32(data[start : start + length].tobytes())


def test_what_was_compiled_is_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert load_native() is not None
    (made,) = (tmp_path / "cache").iterdir()
    before = made.stat().st_mtime_ns
    find_native.cache_clear()
    assert load_native() is not None
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [before]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_library_that_others_could_have_put_there_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(CACHE_VARIABLE, str(shared))
    assert load_native() is not None
    assert list(shared.iterdir()) == []


def test_a_damaged_library_in_the_cache_is_made_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = "from remote_payload.health.native import load_native; print(load_native().checksum)"
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, CACHE_VARIABLE: str(cache)}, timeout=120, check=True
        )
        (made,) = cache.iterdir()
        assert made.read_bytes()[:4] == b"\x7fELF"
        made.write_bytes(b"no library")


@pytest.mark.parametrize("script", ["echo no such option >&2; exit 1", "exit 0"])
def test_a_compiler_that_makes_nothing_means_torchs_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None, script: str
) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert load_native() is None
    path = tmp_path / "small.pt"
    torch.save({"state_dict": {"a.weight": torch.randn(30, 30)}}, path)
    result = scan(read_header(str(path)), "cpu", lambda _d, _t: None, None, True)
    assert len(result.stats) == 1
    assert result.native is not None
    assert (result.native.used, str(compiler) in result.native.why_not) == (False, True)
    assert ("ended with 1: no such option" in result.native.why_not) is ("exit 1" in script)


def test_no_compiler_means_torchs_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_native() is None
    assert find_native().why_not == "no C compiler was found: none of cc, gcc, clang"


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_COMPILE_LIMIT_S", 0.2)
    assert load_native() is None
    assert "took more than" in find_native().why_not


def test_the_document_says_whether_compiled_kernels_were_used_and_why_not(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    torch.save({"state_dict": {"a.weight": torch.randn(30, 30)}}, path)
    said = examined(path)["compiled_kernels"]
    assert said == {"used": False, "why_not": "a file this small is read before a compiler has ended"}
    result = scan(read_header(str(path)), "cpu", lambda _d, _t: None, None, True)
    assert result.native is not None
    assert (result.native.used, result.native.why_not) == (True, "")


def test_a_large_checkpoint_gets_compiled_kernels_by_itself(tmp_path: Path) -> None:
    path, cache = tmp_path / "large.pt", tmp_path / "cache"
    torch.save({"state_dict": {"a.weight": torch.ones(2**24 + 5)}}, path)
    code = (
        "import sys; from remote_payload.checkpoint import read_header; from remote_payload.health.scan import scan;"
        "result = scan(read_header(sys.argv[1]), 'cpu', lambda d, t: None);"
        "print(result.stats['a.weight'].one_fraction)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, CACHE_VARIABLE: str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "1.0"
    assert [p.suffix for p in cache.iterdir()] == [".so"]


def test_of_kept_kernels_those_unused_for_longest_are_removed_and_no_other_file(tmp_path: Path) -> None:
    for age in range(MOST_KEPT + 3):
        for kind in ("native", "cuda"):
            (tmp_path / f"{kind}-{age}").write_bytes(b"")
            os.utime(tmp_path / f"{kind}-{age}", ns=((1000 - age) * 10**9, 10**9))
    (tmp_path / "mine").write_bytes(b"")
    forget_old(str(tmp_path / f"native-{MOST_KEPT + 2}"))
    left = {p.name for p in tmp_path.iterdir()}
    assert {n for n in left if n.startswith("native-")} == {
        *(f"native-{age}" for age in range(MOST_KEPT - 1)),
        f"native-{MOST_KEPT + 2}",
    }
    assert len(left) == MOST_KEPT + MOST_KEPT + 3 + 1


def test_what_others_could_have_written_is_not_read_back(tmp_path: Path) -> None:
    write_kept(str(tmp_path / "cuda-a"), b"code")
    assert read_kept(str(tmp_path / "cuda-a")) == b"code"
    (tmp_path / "cuda-a").chmod(0o666)
    assert read_kept(str(tmp_path / "cuda-a")) is None
