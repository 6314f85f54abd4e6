"""Files that are damaged, forged, made to run code, or no checkpoints at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.checkpoint import CheckpointError, CheckpointHeader, header_findings, read_header
from remote_payload.checkpoint.__main__ import main
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.wire.results import Finding, Severity
from tests.support.checkpoints import (
    HOSTILE_NAMES,
    CodeOnLoad,
    cut_points,
    hostile_pickles,
    nested_dicts_pickle,
    not_checkpoints,
    reference_checkpoint,
    safetensors_bytes,
    shared_lists_pickle,
    tensor_pickle,
    torch_zip_of,
    trained_small_checkpoint,
)

HOSTILE = sorted(hostile_pickles(Path("unused")))
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def findings_of(path: Path) -> tuple[CheckpointHeader | CheckpointError, list[Finding]]:
    try:
        header = read_header(path)
    except CheckpointError as error:
        return error, list(error.findings)
    return header, header_findings(header)


def ids(path: Path) -> set[str]:
    return {f.id for f in findings_of(path)[1]}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("container", ["zip", "bare"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_would_run_code_runs_none_and_is_named(tmp_path: Path, kind: str, container: str) -> None:
    marker = tmp_path / "marker"
    stream = hostile_pickles(marker)[kind]
    file = written(tmp_path / "c.pt", torch_zip_of(stream) if container == "zip" else stream)
    findings = findings_of(file)[1]
    unsafe = [f for f in findings if f.id == "security.unsafe_global"]
    assert [f.severity for f in unsafe][:1] == [Severity.ERROR]
    assert any(name.split(".")[-1] in ("system", "eval", "getattr") for name in unsafe[0].where)
    assert not marker.exists()


@pytest.mark.parametrize(
    "kind", [k for k in HOSTILE if k not in ("before_an_error", "newobj", "newobj_ex", "dotted_name")]
)
def test_the_hostile_fixtures_do_run_code_where_they_are_obeyed(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run(
        [sys.executable, "-c", code], input=hostile_pickles(marker)[kind], capture_output=True, timeout=60, check=False
    )
    assert marker.exists() or kind in ("partial", "getattr")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_object_beside_weights_leaves_the_weights_readable(tmp_path: Path, zipped: bool) -> None:
    marker, file = tmp_path / "marker", tmp_path / "c.pt"
    torch.save({**trained_small_checkpoint(), "extra": CodeOnLoad(marker)}, file, _use_new_zipfile_serialization=zipped)
    header = read_header(file)
    (finding,) = header_findings(header)
    assert finding.id == "security.unsafe_global"
    assert finding.where == ("posix.system",)
    assert finding.evidence["called"] == ["posix.system"]
    assert header.entry_count == 11
    assert load_tensor(header, "first.weight").shape == (5, 6)
    assert not marker.exists()


def test_a_global_that_is_only_named_is_a_warning(tmp_path: Path) -> None:
    file = written(tmp_path / "c.pt", torch_zip_of(b"\x80\x02}X\x01\x00\x00\x00acmymodels\nNet\ns."))
    (finding,) = header_findings(read_header(file))
    assert (finding.severity, finding.where) == (Severity.WARNING, ("mymodels.Net",))


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "evilmodule.py"
    package.write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    file = written(tmp_path / "c.pt", torch_zip_of(b"\x80\x02cevilmodule\nThing\n)R."))
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    command = [sys.executable, "-m", "remote_payload.checkpoint", str(file), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert result.returncode == 1
    assert json.loads(result.stdout)["findings"][0]["where"] == ["evilmodule.Thing"]
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("kind", sorted(not_checkpoints()))
def test_a_file_that_is_no_checkpoint_is_refused_as_one(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / "file", not_checkpoints()[kind])
    error = findings_of(file)[0]
    assert isinstance(error, CheckpointError)
    assert error.kind in ("not_a_checkpoint", "truncated" if kind == "one_byte" else "not_a_checkpoint")
    assert error.action
    assert main([str(file)]) == 2


def test_missing_folder_fifo_and_unreadable_have_their_own_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    kinds = {}
    for name in ("missing", "folder", "fifo", "nul\0name", "x" * 5000):
        with pytest.raises(CheckpointError) as caught:
            read_header(tmp_path / name)
        kinds[name[:8]] = caught.value.kind
    assert kinds == {
        "missing": "missing",
        "folder": "is_directory",
        "fifo": "not_a_checkpoint",
        "nul\0name": "unreadable",
        "xxxxxxxx": "unreadable",
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_called_truncated_and_never_whole(tmp_path: Path, zipped: bool) -> None:
    file, cut = tmp_path / "c.pt", tmp_path / "cut.pt"
    torch.save(trained_small_checkpoint(), file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    header = read_header(file)
    interesting = [o for r in header.records for o in (r.offset, r.offset + r.size)]
    interesting.extend(m for m in range(0, 4096, 97))
    for length in cut_points(len(data), interesting):
        outcome, findings = findings_of(written(cut, data[:length]))
        if isinstance(outcome, CheckpointError):
            assert outcome.kind in ("truncated", "not_a_checkpoint", "malformed"), length
            assert outcome.kind == "truncated" or length < 120, (length, str(outcome))
        else:
            assert "integrity.truncated" in {f.id for f in findings}, length


def test_a_truncated_zip_still_tells_names_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), file)
    whole = read_header(file)
    cut = written(tmp_path / "cut.pt", file.read_bytes()[: file.stat().st_size * 2 // 3])
    header = read_header(cut)
    assert header.entry_count == 162
    assert header.parameter_count == whole.parameter_count
    readable = [t for t in header.tensors if t.file_offset is not None]
    assert 0 < len(readable) < len(header.tensors)
    for tensor in readable:
        assert load_tensor(header, tensor.name).equal(load_tensor(whole, tensor.name))
    (finding,) = header_findings(header)
    assert finding.evidence["tensors_need_bytes"] == sum(t.nbytes or 0 for t in whole.tensors)
    assert main([str(cut)]) == 1


def test_bytes_lost_in_the_middle_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), file)
    data = file.read_bytes()
    middle = len(data) // 2
    cut = written(tmp_path / "cut.pt", data[:middle] + data[middle + 64 :])
    assert "integrity.truncated" in ids(cut)
    lost = [t for t in read_header(cut).tensors if t.file_offset is None]
    assert lost


def test_no_flipped_bit_in_the_structure_raises_anything_but_a_checkpoint_error(tmp_path: Path) -> None:
    file, flipped = tmp_path / "c.pt", tmp_path / "flipped.pt"
    torch.save({"w": torch.ones(3), "n": [1, 2, {"a": 0.5}]}, file)
    data = bytearray(file.read_bytes())
    for position in range(len(data)):
        for bit in (0, 3, 7):
            data[position] ^= 1 << bit
            outcome, _ = findings_of(written(flipped, bytes(data)))
            if isinstance(outcome, CheckpointHeader):
                json.dumps(outcome.to_json(), allow_nan=False)
            data[position] ^= 1 << bit


def test_random_bytes_as_a_pickle_raise_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    chance = random.Random(7)
    opcodes = (
        b"(0.1NIJKLMRSTUVXabcdeghijlopqrstu}]){GQP\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x93\x94\x95"
    )
    for _ in range(3000):
        stream = bytes(chance.choice(opcodes) if chance.random() < 0.8 else chance.randrange(256) for _ in range(60))
        outcome, _ = findings_of(written(tmp_path / "c.pt", torch_zip_of(b"\x80\x02" + stream)))
        if isinstance(outcome, CheckpointHeader):
            json.dumps(outcome.to_json(), allow_nan=False)


def test_mutated_real_pickles_raise_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    chance = random.Random(11)
    file = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), file)
    with zipfile.ZipFile(file) as archive:
        stream = archive.read("c/data.pkl")
        storages = {n[7:]: archive.read(n) for n in archive.namelist() if n.startswith("c/data/")}
    for _ in range(1500):
        mutated = bytearray(stream)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        outcome, _ = findings_of(written(tmp_path / "m.pt", torch_zip_of(bytes(mutated), storages)))
        if isinstance(outcome, CheckpointHeader):
            json.dumps(outcome.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"numel": 5}, "integrity.record_size"),
        ({"numel": 3, "shape": (3,)}, "integrity.record_size"),
        ({"numel": 2**61, "shape": (2**61,)}, "integrity.record_size"),
        ({"shape": (5,)}, "integrity.view_outside"),
        ({"offset": 1}, "integrity.view_outside"),
        ({"stride": (2,)}, "integrity.view_outside"),
        ({"stride": (2**61,)}, "integrity.view_outside"),
        ({"shape": (2**40, 2**40), "stride": (2**40, 1)}, "integrity.view_outside"),
        ({"key": "7"}, "integrity.record_missing"),
        ({"key": "../../../etc/passwd"}, "integrity.record_missing"),
        ({"storage": "DoubleStorage"}, "integrity.record_size"),
    ],
    ids=str,
)
def test_a_forged_tensor_is_found_and_not_readable(tmp_path: Path, claims: dict[str, Any], expected: str) -> None:
    file = written(tmp_path / "c.pt", torch_zip_of(tensor_pickle(**claims), {"0": FOUR_FLOATS}))
    header = read_header(file)
    assert {f.id for f in header_findings(header)} == {expected}
    with pytest.raises(CheckpointError):
        load_tensor(header, "weight")


@pytest.mark.parametrize(
    "claims", [{"numel": -1}, {"shape": (-4,)}, {"offset": -1}, {"shape": (2, 2)}, {"storage": "Net"}]
)
def test_a_tensor_of_impossible_claims_is_malformed(tmp_path: Path, claims: dict[str, Any]) -> None:
    file = written(tmp_path / "c.pt", torch_zip_of(tensor_pickle(**claims), {"0": FOUR_FLOATS}))
    error = findings_of(file)[0]
    assert isinstance(error, CheckpointError)
    assert error.kind == "malformed"


def forge_directory(data: bytes, name: str, field: int, value: int) -> bytes:
    """Overwrite four bytes at `field` of one record's entry in the zip's directory."""
    at = 0
    forged = bytearray(data)
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        length = struct.unpack_from("<H", data, at + 28)[0]
        if data[at + 46 : at + 46 + length].decode() == name:
            struct.pack_into("<I", forged, at + field, value)
        at += 4
    return bytes(forged)


def test_forged_offsets_and_sizes_in_the_directory_are_found(tmp_path: Path) -> None:
    good = torch_zip_of(tensor_pickle(), {"0": FOUR_FLOATS, "1": bytes(64)})
    size, packed, offset = 24, 20, 42
    file = tmp_path / "c.pt"
    for field, value, expected in (
        (offset, 3, "integrity.record_misplaced"),
        (offset, 0, "integrity.record_misplaced"),
        (offset, 2**31, "integrity.record_misplaced"),
        (size, 17, "integrity.record_packed"),
        (packed, 2**31, "integrity.truncated"),
    ):
        found = ids(written(file, forge_directory(good, "archive/data/0", field, value)))
        assert expected in found, (field, value, found)
        assert next(iter(read_header(file).tensors)).file_offset is None


def test_two_records_over_the_same_bytes_are_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
        archive.writestr("archive/data/0", FOUR_FLOATS)
        archive.infolist()
        archive.filelist.append(archive.getinfo("archive/data/0"))
    assert "integrity.record_overlap" in ids(written(tmp_path / "c.pt", buffer.getvalue()))


def test_a_wrong_total_in_the_end_record_is_an_error_not_a_hang(tmp_path: Path) -> None:
    good = torch_zip_of(tensor_pickle(), {"0": FOUR_FLOATS})
    at = good.rfind(b"PK\x05\x06")
    for offset, pattern in ((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I")):
        for value in (0, 1, 0xFFFE, 0xFFFF):
            forged = bytearray(good)
            struct.pack_into(pattern, forged, at + offset, value)
            findings_of(written(tmp_path / "c.pt", bytes(forged)))


def test_compressed_tensors_are_found_and_not_inflated(tmp_path: Path) -> None:
    file = written(tmp_path / "c.pt", torch_zip_of(tensor_pickle(), {"0": FOUR_FLOATS}, zipfile.ZIP_DEFLATED))
    header = read_header(file)
    assert {f.id for f in header_findings(header)} == {"integrity.record_packed"}
    assert header.tensor("weight").file_offset is None


def zip_bomb() -> bytes:
    """data.pkl of 8 GiB in 8 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * 1024 * 1024))
    return buffer.getvalue()


def run_limited(file: Path, memory_bytes: int = 700 * 1024 * 1024) -> subprocess.CompletedProcess[bytes]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    command = [sys.executable, "-m", "remote_payload.checkpoint", str(file), "--json"]
    return subprocess.run(command, capture_output=True, timeout=120, preexec_fn=limit, check=False)


BOMBS = {
    "inflating_pickle": zip_bomb,
    "forged_inflated_size": lambda: forge_directory(
        torch_zip_of(b"\x80\x02N." + bytes(1 << 20), compression=zipfile.ZIP_DEFLATED), "archive/data.pkl", 24, 1 << 30
    ),
    "thousand_nested_dicts": lambda: torch_zip_of(nested_dicts_pickle(1000)),
    "million_nested_dicts": lambda: torch_zip_of(nested_dicts_pickle(1_000_000)),
    "million_nested_lists": lambda: torch_zip_of(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."),
    "million_nested_tuples": lambda: torch_zip_of(b"\x80\x02)" + b"\x85" * 1_000_000 + b"."),
    "nested_tuple_as_key": lambda: torch_zip_of(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."),
    "million_marks": lambda: torch_zip_of(b"\x80\x02" + b"(" * 1_000_000 + b"."),
    "billion_laughs": lambda: torch_zip_of(shared_lists_pickle(60)),
    "laughs_as_weights": lambda: torch_zip_of(b"\x80\x02}X\x01\x00\x00\x00a" + shared_lists_pickle(60)[2:-1] + b"s."),
    "endless_copies": lambda: torch_zip_of(
        b"\x80\x02](" + b"N" * 100_000 + b"eq\x00]q\x01" + b"h\x01cbuiltins\nlist\nh\x00\x85Ra0" * 40_000 + b"."
    ),
    "huge_memo_index": lambda: torch_zip_of(b"\x80\x02Nr\xff\xff\xff\xff."),
    "huge_string_length": lambda: torch_zip_of(b"\x80\x04\x8d" + b"\xff" * 8 + b"abc."),
    "huge_integer": lambda: torch_zip_of(b"\x80\x02}X\x01\x00\x00\x00a\x8b\x00\x04\x00\x00" + b"\x7f" * 1024 + b"s."),
    "huge_decimal": lambda: torch_zip_of(b"I" + b"9" * 1_000_000 + b"\n."),
    "colliding_keys": lambda: torch_zip_of(
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 50_000))
        + b"u."
    ),
    "bytearray_of_a_size": lambda: torch_zip_of(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "range_as_a_list": lambda: torch_zip_of(b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R."),
    "rebuild_in_rebuild": lambda: torch_zip_of(
        b"\x80\x02(" + b"ctorch._tensor\n_rebuild_from_type_v2\n(" * 30_000 + b"N" + b"NNt" * 30_000 + b"."
    ),
    "million_tensors": lambda: torch_zip_of(
        b"\x80\x02](" + tensor_pickle()[2:-1] + b"q\x00" + b"h\x00" * 1_000_000 + b"e."
    ),
    "safetensors_deep_json": lambda: safetensors_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "safetensors_long_number": lambda: safetensors_bytes(b'{"a":' + b"9" * 1_000_000 + b"}", b""),
    "safetensors_huge_header": lambda: struct.pack("<Q", 1 << 62) + b"{" + bytes(100),
}


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_a_bomb_costs_neither_memory_nor_a_hang(tmp_path: Path, kind: str) -> None:
    result = run_limited(written(tmp_path / "c.pt", BOMBS[kind]()))
    assert result.returncode in (0, 1, 2), result.stderr[-500:]
    document = json.loads(result.stdout)
    assert document["error"] is None or document["error"]["kind"] in ("malformed", "truncated", "not_a_checkpoint")
    assert b"Traceback" not in result.stderr
    assert len(result.stdout) < 400_000_000


def test_a_thousand_nested_dicts_with_a_tensor_inside_are_read(tmp_path: Path) -> None:
    tree: Any = {"w": torch.ones(2)}
    for _ in range(150):
        tree = {"x": tree}
    file = tmp_path / "c.pt"
    torch.save(tree, file)
    header = read_header(file)
    assert len(header.tensors) == 1
    assert load_tensor(header, header.tensors[0].name).sum() == 2


def test_hostile_names_stay_data_in_text_and_json(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    file = tmp_path / "c.pt"
    state = {name: torch.ones(2) for name in HOSTILE_NAMES if "\ud800" not in name}
    torch.save({"state_dict": state, "config": {n: n for n in state}, "note": HOSTILE_NAMES[3]}, file)
    assert main([str(file)]) == 0
    text = capfdbinary.readouterr().out
    assert not any(byte in text for byte in (b"\x1b", b"\x07", b"\r", b"\xe2\x80\xae"))
    assert main([str(file), "--json"]) == 0
    document = json.loads(capfdbinary.readouterr().out)
    assert {t["key"] for t in document["header"]["tensors"] if len(t["key"]) < 500} == {
        n for n in state if len(n) < 500
    }


def test_a_name_that_is_no_valid_unicode_is_printed_escaped(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    name = "\ud800 lone"
    stream = pickle.dumps({"note": name, name: 1}, protocol=2)
    file = written(tmp_path / "c.pt", torch_zip_of(stream))
    assert main([str(file)]) == 0
    assert b"\\ud800 lone" in capfdbinary.readouterr().out
    assert main([str(file), "--json"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["header"]["scalars"]["note"] == name


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7), "integrity.truncated"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8), "integrity.record_size"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9), "integrity.record_overlap"),
        (
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"},
            bytes(8),
            "integrity.record_overlap",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), "malformed"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "malformed"),
        ({"a": {"dtype": "F32", "shape": 2}}, bytes(8), "malformed"),
        (b'{"a": {}, "a": {}}', b"", "malformed"),
        (b"{not json", b"", "malformed"),
    ],
    ids=str,
)
def test_damaged_safetensors_are_found(tmp_path: Path, header: Any, data: bytes, expected: str) -> None:
    file = written(tmp_path / "m.safetensors", safetensors_bytes(header, data))
    outcome, findings = findings_of(file)
    assert expected in ({f.id for f in findings} | {getattr(outcome, "kind", "")})


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "missing.safetensors", "a\0b"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    written(tmp_path / "outside.safetensors", safetensors_bytes({}, b""))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    error = findings_of(folder)[0]
    assert isinstance(error, CheckpointError)
    assert error.kind in ("malformed", "truncated")


def test_json_output_of_an_error_is_one_document(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main([str(tmp_path / "nothing"), "--json"]) == 2
    document = json.loads(capfdbinary.readouterr().out)
    assert document["header"] is None
    assert document["error"]["kind"] == "missing"
    assert main([]) == 2
    assert main(["a", "b"]) == 2


def test_an_appended_archive_does_not_hide_the_first(tmp_path: Path) -> None:
    first = torch_zip_of(tensor_pickle(), {"0": FOUR_FLOATS})
    assert "integrity.trailing_bytes" in ids(written(tmp_path / "c.pt", first + b"appended"))


def test_checksums_left_out_are_told_from_checksums_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save({"w": torch.ones(3), "e": torch.empty(0)}, file)
    records = {r.name.partition("/")[2]: r for r in read_header(file).records}
    assert records["data/0"].crc32 == zlib.crc32(struct.pack("<3f", 1, 1, 1))
    assert records["data/1"].crc32 == 0
