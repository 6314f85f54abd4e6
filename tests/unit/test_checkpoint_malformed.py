"""Every layout, damaged and forged: nothing runs, nothing hangs, nothing eats memory, nothing outside is opened."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remote_payload.checkpoint import CheckpointError, CheckpointHeader, header_findings, read_header
from remote_payload.checkpoint.errors import MalformedCheckpointError, UnsupportedCheckpointError
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Cost, Limits
from remote_payload.checkpoint.tensor_bytes import iter_tensor_bytes
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.wire.results import Finding, Severity
from tests.support.checkpoints import (
    hostile_pickles,
    safetensors_bytes,
    shared_lists_pickle,
    tensor_pickle,
    torch_zip_of,
)
from tests.support.formats import (
    edit_dcp_metadata,
    write_dcp_checkpoint,
    write_deepspeed_checkpoint,
    write_torch_shards,
)

ROOT = Path(__file__).parents[2]
HOSTILE = sorted(hostile_pickles(Path("unused")))
STATE = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}, "epoch": 3}


def small_state() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).bfloat16(), "n": torch.tensor(7)}


def layouts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """For each layout: what is read, and the file of it that is damaged."""
    folder.mkdir()
    torch.save({"model": small_state(), "epoch": 1}, folder / "zip.pt")
    torch.save({"model": small_state()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    data = struct.pack("<9f", *range(9))
    entries = {"a": ((2, 3), 0, 24), "b": ((3,), 24, 36)}
    header = {n: {"dtype": "F32", "shape": list(s), "data_offsets": [i, j]} for n, (s, i, j) in entries.items()}
    (folder / "one.safetensors").write_bytes(safetensors_bytes(header, data))
    write_dcp_checkpoint(folder / "dcp", STATE)
    write_torch_shards(folder / "shards", small_state())
    write_deepspeed_checkpoint(folder / "ds", ranks=1)
    return {
        "zip": (folder / "zip.pt", folder / "zip.pt"),
        "legacy": (folder / "legacy.pt", folder / "legacy.pt"),
        "safetensors": (folder / "one.safetensors", folder / "one.safetensors"),
        "dcp_metadata": (folder / "dcp", folder / "dcp" / ".metadata"),
        "dcp_data": (folder / "dcp", folder / "dcp" / "__0_0.distcp"),
        "torch_index": (folder / "shards", folder / "shards" / "pytorch_model.bin.index.json"),
        "deepspeed_latest": (folder / "ds", folder / "ds" / "latest"),
        "deepspeed_optimizer": (
            folder / "ds",
            folder / "ds" / "global_step30" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
    }


LAYOUTS = (
    "zip",
    "legacy",
    "safetensors",
    "dcp_metadata",
    "dcp_data",
    "torch_index",
    "deepspeed_latest",
    "deepspeed_optimizer",
)
MUTATIONS_EACH = 700


def outcomes_of(target: Path, file: Path, mutations: list[list[Any]]) -> dict[str, int]:
    command = [sys.executable, str(ROOT / "tests/support/read_worker.py"), str(ROOT), str(target), str(file)]
    done = subprocess.run(command, input=json.dumps(mutations).encode(), capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:].decode(errors="replace")
    outcomes = json.loads(done.stdout)
    assert any(outcome.startswith("whole: read") for outcome in outcomes), outcomes
    return dict(outcomes)


def spread(size: int, count: int) -> list[int]:
    step = max(1, size // count)
    return list(range(0, size, step))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_anywhere_is_read_or_refused_and_nothing_else(tmp_path: Path, layout: str) -> None:
    target, file = layouts(tmp_path / "made")[layout]
    mutations = [["flip", at, 1 << (at % 8)] for at in spread(file.stat().st_size, MUTATIONS_EACH)]
    outcomes = outcomes_of(target, file, mutations)
    assert sum(outcomes.values()) == len(mutations) + 1
    damaged = ("malformed", "truncated", "is_directory")
    assert any(outcome in damaged or "integrity." in outcome for outcome in outcomes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_never_called_whole(tmp_path: Path, layout: str) -> None:
    target, file = layouts(tmp_path / "made")[layout]
    size = file.stat().st_size
    cuts = sorted({*spread(size, MUTATIONS_EACH // 2), *range(max(0, size - 70), size)})
    outcomes = outcomes_of(target, file, [["cut", length] for length in cuts])
    whole = outcomes.get("read", 0)
    # The name in `latest` and the partitions' tags may be cut without anything else being missing.
    assert whole == 0 or layout == "deepspeed_latest", outcomes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forged_numbers_anywhere_are_read_or_refused_and_nothing_else(tmp_path: Path, layout: str) -> None:
    target, file = layouts(tmp_path / "made")[layout]
    values = ("ffffffffffffffff", "ffffff7f", "0000000000000080", "00000000", "8bffffff7f", "95ffffffffffffffff")
    places = spread(max(1, file.stat().st_size - 9), MUTATIONS_EACH // len(values))
    outcomes_of(target, file, [["write", at, value] for at in places for value in values])


# pickles that would run code, wherever a layout has a pickle


def unsafe(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.id == "security.unsafe_global" and f.severity is Severity.ERROR]


def all_findings(path: Path) -> list[Finding]:
    try:
        return header_findings(read_header(path))
    except CheckpointError as error:
        return list(error.findings)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["metadata", "item", "shard", "partition", "meta"])
def test_code_in_any_pickle_of_a_folder_does_not_run(tmp_path: Path, kind: str, place: str) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "made"
    stream = hostile_pickles(marker)[kind]
    archive = torch_zip_of(stream)
    if place in ("metadata", "item", "meta"):
        write_dcp_checkpoint(folder, STATE)
        if place == "metadata":
            (folder / ".metadata").write_bytes(stream)
        elif place == "meta":
            (folder / "meta.pt").write_bytes(archive)
        else:
            (folder / "__9_0.distcp").write_bytes(archive)
            edit_dcp_metadata(folder, lambda m: move_item(m, "epoch", "__9_0.distcp", 0, len(archive)))
    elif place == "shard":
        weight_map = write_torch_shards(folder, small_state())
        (folder / next(iter(weight_map.values()))).write_bytes(archive)
    else:
        write_deepspeed_checkpoint(folder)
        next(folder.rglob("*rank_1*optim_states.pt")).write_bytes(archive)
    findings = all_findings(folder)
    assert not marker.exists()
    is_cut_off = "before_an_error" in kind
    assert unsafe(findings) or (is_cut_off and findings)


def move_item(metadata: Any, name: str, file: str, offset: int, length: int) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path, place.offset, place.length = file, offset, length


# DCP metadata that lies


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../x.distcp", "", ".", "..", "a\0b", "x\ny", "\x1b[2J", "~/x"]
)
def test_metadata_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "made"
    write_dcp_checkpoint(folder, STATE)
    edit_dcp_metadata(folder, lambda m: move_item(m, "model.w", name, 0, 100))
    with pytest.raises(MalformedCheckpointError, match="no plain file name"):
        read_header(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "metadata"])
def test_links_out_of_a_dcp_folder_are_not_followed(tmp_path: Path, kind: str) -> None:
    folder, outside = tmp_path / "made", tmp_path / "outside"
    write_dcp_checkpoint(folder, STATE)
    outside.mkdir()
    if kind == "metadata":
        (folder / ".metadata").rename(outside / "m")
        (folder / ".metadata").symlink_to(outside / "m")
    else:
        (folder / "__0_0.distcp").rename(outside / "data.distcp")
        name = "data.distcp" if kind == "file" else "below/data.distcp"
        (folder / name.split("/")[0]).symlink_to(outside / "data.distcp" if kind == "file" else outside)
        edit_dcp_metadata(folder, lambda m: [setattr(p, "relative_path", name) for p in m.storage_data.values()])
    with pytest.raises(MalformedCheckpointError, match="link out of its folder"):
        read_header(folder)


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket_like"])
def test_a_data_file_that_is_no_file_does_not_hang(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "made"
    write_dcp_checkpoint(folder, STATE)
    (folder / "__0_0.distcp").unlink()
    if kind == "fifo":
        os.mkfifo(folder / "__0_0.distcp")
    elif kind == "folder":
        (folder / "__0_0.distcp").mkdir()
    else:
        (folder / "__0_0.distcp").symlink_to(folder / "__0_0.distcp")
    assert any(f.dimension is not None for f in all_findings(folder))


def set_chunks(metadata: Any, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], size: tuple[int, ...]) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

    old = metadata.state_dict_metadata["model.w"]
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
    metadata.state_dict_metadata["model.w"] = TensorStorageMetadata(old.properties, torch.Size(size), chunks)
    place = next(p for i, p in metadata.storage_data.items() if i.fqn == "model.w")
    for offsets, _ in boxes:
        metadata.storage_data[MetadataIndex("model.w", torch.Size(offsets))] = place


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], (4, 3)),
        ([((0, 0), (2, 3))], (1 << 40, 3)),
        ([((0, 0), (1 << 40, 1 << 20))], (1 << 40, 1 << 20)),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], (3, 3)),
        ([((5, 0), (2, 3))], (2, 3)),
        ([((0,), (6,))], (2, 3)),
        ([], (2, 3)),
        ([((0, 0), (2, 2))], (2, 2)),
        ([((0, 0), (2, 0))], (2, 3)),
        ([((n, 0), (1, 3)) for n in range(5000)], (5000, 3)),
    ],
)
def test_chunks_that_lie_give_a_finding_and_no_wrong_tensor(tmp_path: Path, boxes: Any, size: Any) -> None:
    folder = tmp_path / "made"
    write_dcp_checkpoint(folder, STATE)
    edit_dcp_metadata(folder, lambda m: set_chunks(m, boxes, size))
    header = read_header(folder)
    readable = [t for t in header.tensors if t.name == "w" and t.is_readable]
    is_alias = len(boxes) == 2 and size == (4, 3)
    assert is_alias or (not readable and any(f.id.startswith("integrity.") for f in header_findings(header)))
    assert load_tensor(header, "b").equal(STATE["model"]["b"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (-1, 100, "malformed"),
        (0, -5, "malformed"),
        (1 << 70, 10, "malformed"),
        (0, 1 << 70, "malformed"),
        (1, 5, "malformed"),
        (1 << 50, 100, "integrity.truncated"),
        (10_000_000, 0, "integrity.truncated"),
    ],
)
def test_forged_places_are_refused_or_found(tmp_path: Path, offset: int, length: int, expected: str) -> None:
    folder = tmp_path / "made"
    write_dcp_checkpoint(folder, STATE)
    edit_dcp_metadata(folder, lambda m: move_item(m, "model.b", "__0_0.distcp", offset, length))
    if expected == "malformed":
        with pytest.raises(MalformedCheckpointError):
            read_header(folder)
    else:
        header = read_header(folder)
        assert expected in {f.id for f in header_findings(header)}
        assert not header.tensor("b").is_readable


def test_an_item_that_claims_a_shape_by_stride_zero_fills_no_memory(tmp_path: Path) -> None:
    folder, extent = tmp_path / "made", 1 << 40
    folder.mkdir()
    stream = tensor_pickle(numel=1, shape=(extent,), stride=(0,))
    (folder / "c.pt").write_bytes(torch_zip_of(stream, {"0": bytes(4)}))
    header = read_header(folder / "c.pt")
    with pytest.raises(UnsupportedCheckpointError, match="repeats 4 bytes"):
        load_tensor(header, "weight")
    empty = tensor_pickle(numel=0, shape=(0, 1 << 61, 1 << 61), stride=(1, 1, 1))
    (folder / "c.pt").write_bytes(torch_zip_of(empty, {"0": b""}))
    with pytest.raises(UnsupportedCheckpointError, match="cannot make a tensor"):
        load_tensor(read_header(folder / "c.pt"), "weight")


# bombs


def deflated(stream: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", stream)
    return buffer.getvalue()


def many_shards(folder: Path, archive: bytes, count: int = 60) -> None:
    folder.mkdir()
    weight_map = {f"w{n}": f"shard-{n}.bin" for n in range(count)}
    for name in weight_map.values():
        (folder / name).write_bytes(archive)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def many_items(folder: Path, archive: bytes, count: int = 60) -> None:
    write_dcp_checkpoint(folder, {f"o{n}": n for n in range(count)})
    (folder / "__9_0.distcp").write_bytes(archive * count)
    edit_dcp_metadata(
        folder,
        lambda m: [move_item(m, f"o{n}", "__9_0.distcp", n * len(archive), len(archive)) for n in range(count)],
    )


def live_objects() -> bytes:
    return b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", n) + b"]" for n in range(150_000)) + b"u."


BOMBS: dict[str, Callable[[], bytes]] = {
    "inflating": lambda: deflated(b"\x80\x02N" + b"0N" * (30 * 1024 * 1024) + b"."),
    "inflating_behind_stop": lambda: deflated(b"\x80\x02}." + bytes(60 * 1024 * 1024)),
    "live_objects": lambda: torch_zip_of(live_objects()),
    "broken_at_the_end": lambda: torch_zip_of(live_objects()[:-1] + b"\xff"),
    "laughs": lambda: torch_zip_of(shared_lists_pickle(60)),
}


def run_limited(path: Path) -> dict[str, Any]:
    code = (
        "import json, resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (1_200_000_000,) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (90, 90))\nsys.path.insert(0, sys.argv[1])\n"
        "from remote_payload.checkpoint.__main__ import main\nraise SystemExit(main([sys.argv[2], '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True, timeout=150)
    assert done.returncode in (0, 1, 2), done.stderr[-2000:].decode()
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("make", [many_shards, many_items])
@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_many_files_share_one_budget(tmp_path: Path, kind: str, make: Any) -> None:
    make(tmp_path / "made", BOMBS[kind]())
    run_limited(tmp_path / "made")


def test_a_safetensors_header_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    length = 100 * 1024 * 1024
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length) + b'{"a":')
        opened.truncate(length + 100)
    assert run_limited(file)["error"]["kind"] == "malformed"


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\xff.",
        b"\x80\x02\x8a\xff" + b"\x7f" * 10 + b".",
        b"\x80\x05\x96" + b"\xff" * 8 + b".",
        b"\x80\x03\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02T\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\xff.",
    ],
)
def test_a_length_beyond_the_pickle_is_an_error_before_memory_is_taken(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(torch_zip_of(stream))
    assert run_limited(tmp_path / "c.pt")["error"]["kind"] in ("malformed", "truncated")


def test_values_that_hold_themselves_are_described_and_end(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"epoch": 1}
    loop["self"] = loop
    loop["list"] = [loop]
    loop["list"].append(loop["list"])
    write_dcp_checkpoint(tmp_path / "dcp", {"o": 1, **STATE})
    archive = torch_zip_of(pickle.dumps(loop, 2))
    (tmp_path / "dcp" / "__9_0.distcp").write_bytes(archive)
    edit_dcp_metadata(tmp_path / "dcp", lambda m: move_item(m, "o", "__9_0.distcp", 0, len(archive)))
    assert run_limited(tmp_path / "dcp")["error"] is None
    (tmp_path / "c.pt").write_bytes(archive)
    assert run_limited(tmp_path / "c.pt")["error"] is None
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(loop, 2))
    assert run_limited(tmp_path / "dcp")["error"]["kind"] == "malformed"


def test_a_budget_never_goes_below_zero() -> None:
    spent = Cost(1 << 60, 1 << 60, 1 << 60)
    left = DEFAULT_LIMITS.after(spent).after(spent)
    assert (left.pickle_bytes, left.opcodes, left.memory_bytes) == (0, 0, 0)
    assert DEFAULT_LIMITS.after(Cost()) == Limits()


# fuzzing

FUZZ_S = 15.0
PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\xff" * 8, b"\0" * 8, b"PK\x03\x04", b"PK\x05\x06", b"PK\x01\x02", b"PK\x07\x08", b"\x80\x02", b"."]
    ),
)


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors", "dcp_metadata", "dcp_data"])
def test_spliced_and_overwritten_files_raise_nothing_but_checkpoint_errors(tmp_path: Path, layout: str) -> None:
    target, file = layouts(tmp_path / "made")[layout]
    whole = file.read_bytes()
    ends = time.monotonic() + FUZZ_S
    position = st.integers(0, len(whole))

    @settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(position, position, PIECES), min_size=1, max_size=4))
    def attack(edits: list[tuple[int, int, bytes]]) -> None:
        if time.monotonic() > ends:
            return
        data = whole
        for at, other, piece in edits:
            # Replace, insert, cut out or repeat, whichever the two positions make of it.
            start, stop = min(at, other), max(at, other)
            data = data[:start] + piece + (data[start:] if at < other else data[stop:])
        file.write_bytes(data)
        try:
            header = read_header(target)
        except CheckpointError:
            return
        check_tensors(header)

    attack()


def check_tensors(header: CheckpointHeader) -> None:
    json.dumps(header.to_json(), allow_nan=False)
    for tensor in header.tensors:
        try:
            loaded = load_tensor(header, tensor.name)
            read = sum(map(len, iter_tensor_bytes(header, tensor.name)))
        except CheckpointError:
            continue
        assert tuple(loaded.shape) == tensor.shape
        assert read == tensor.span_bytes
