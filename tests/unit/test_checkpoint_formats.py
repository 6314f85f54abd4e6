"""Checkpoints of several files and of other frameworks' layouts, against what their own writers say is in them."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remote_payload.checkpoint import CheckpointError, CheckpointHeader, Section, header_findings, read_header
from remote_payload.checkpoint.__main__ import main
from remote_payload.checkpoint.errors import CheckpointIsDirectoryError, TruncatedCheckpointError
from remote_payload.checkpoint.source import fingerprint_of
from remote_payload.checkpoint.tensor_bytes import iter_tensor_bytes, map_tensor
from remote_payload.checkpoint.tiling import is_grid, is_in_row_order
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.wire.results import Severity
from tests.support.agent_node import interpreters
from tests.support.checkpoints import SmallNet, trained_small_checkpoint
from tests.support.formats import (
    all_fixture_folders_and_files,
    deepspeed_run,
    lightning_checkpoint,
    write_dcp_checkpoint,
    write_deepspeed_checkpoint,
    write_fsdp2_checkpoint,
    write_torch_shards,
)


def tensors_of(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {p: t for k, v in items for p, t in tensors_of(v, (*path, str(k))).items()}


def assert_all_equal(header: CheckpointHeader, saved: Any, model_key: str) -> None:
    expected = tensors_of(saved)
    assert len(header.tensors) == len(expected)
    for path, tensor in expected.items():
        inside = path if model_key == "" else path[1:] if path[0] == model_key else ()
        name = ".".join(inside) or "/".join(path)
        loaded = load_tensor(header, name)
        assert loaded.dtype == tensor.dtype
        assert loaded.equal(tensor), name
        if tensor.is_contiguous() and tensor.numel():
            raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert b"".join(iter_tensor_bytes(header, name, 16)) == raw, name


def errors_of(header: CheckpointHeader) -> set[str]:
    return {f.id for f in header_findings(header) if f.severity is Severity.ERROR}


# torch.distributed.checkpoint


def test_a_folder_of_one_process_is_read_as_it_was_saved(tmp_path: Path) -> None:
    saved = write_dcp_checkpoint(tmp_path / "step")
    header = read_header(tmp_path / "step")
    assert (header.format, header.state_path, header_findings(header)) == ("torch_dcp", "model_state_dict", [])
    assert_all_equal(header, saved, "model_state_dict")
    assert header.scalars == {"epoch": 3, "val_loss": 0.5}
    assert header.config == {"learning_rate": 1e-3, "layers": [8, 4]}
    assert header.optimizer is not None
    assert (header.optimizer.kind, header.optimizer.mapping, header.optimizer.steps) == ("AdamW", "by_order", (2.0,))
    assert header.optimizer.groups[0]["betas"] == [0.9, 0.999]
    assert all(r.crc32 is not None for r in header.records if r.size)


def test_tensors_that_two_ranks_saved_in_rows_are_one_tensor_each(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "step"
    write_fsdp2_checkpoint(folder)
    header = read_header(folder)
    whole = {n: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for n, t in
             ((n, header.tensor(n)) for n in ("0.weight", "0.bias", "1.running_var", "2.weight"))}  # fmt: skip
    dcp.load({"model": whole}, checkpoint_id=str(folder), no_dist=True)
    assert header.tensor("0.weight").pieces[1].offsets == (3, 0)
    assert header.tensor("0.weight").is_readable
    assert not header.tensor("1.running_var").pieces
    for name, expected in whole.items():
        assert load_tensor(header, name).equal(expected)
        assert b"".join(iter_tensor_bytes(header, name)) == expected.numpy().tobytes()
    assert header.optimizer is not None
    assert header.optimizer.mapping == "by_name"
    assert header.optimizer.without_state == ()
    assert header.optimizer.state_count == 6
    assert header_findings(header) == []
    assert not any("cannot be read" in n for n in header.notes)
    with pytest.raises(CheckpointError, match="pieces"):
        map_tensor(header, "0.weight")


def test_layouts_in_memory_survive_the_folder(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "transposed": base.t(),
        "part": base[1:3, 2:5],
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.arange(5).bfloat16(),
        "tied": base,
        "nested": {"list": [torch.ones(2), {"deep": torch.zeros(1)}]},
    }
    write_dcp_checkpoint(tmp_path / "step", state)
    assert_all_equal(read_header(tmp_path / "step"), state, "")


def test_what_stands_alone_under_one_key_is_unwrapped(tmp_path: Path) -> None:
    trained = trained_small_checkpoint()
    state = {"app": {"model": trained["model_state_dict"], "optim": trained["optimizer_state_dict"]}}
    write_dcp_checkpoint(tmp_path / "step", state)
    header = read_header(tmp_path / "step")
    assert (header.state_path, header.entry_count) == ("model", len(trained["model_state_dict"]))
    assert header.optimizer is not None
    assert any("'app'" in note for note in header.notes)


def test_a_lightning_folder_takes_its_values_from_meta(tmp_path: Path) -> None:
    whole, _ = lightning_checkpoint()
    folder = tmp_path / "epoch=4.ckpt"
    write_dcp_checkpoint(folder, {"state_dict": dict(whole["state_dict"])})
    torch.save({k: v for k, v in whole.items() if k not in ("state_dict", "optimizer_states")}, folder / "meta.pt")
    header = read_header(folder)
    assert (header.state_path, header.scalars["global_step"]) == ("state_dict", 1250)
    assert header.config == whole["hyper_parameters"]


def test_a_broken_meta_file_costs_its_values_and_no_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "epoch=4.ckpt"
    saved = write_dcp_checkpoint(folder)
    (folder / "meta.pt").write_bytes(b"PK\x03\x04 and no more")
    header = read_header(folder)
    assert errors_of(header) == {"integrity.shard_incomplete"}
    assert load_tensor(header, "head.weight").equal(saved["model_state_dict"]["head.weight"])


@pytest.mark.parametrize("cut", [1, 700, 1600, 5000])
def test_a_data_file_cut_short_loses_what_lay_behind_and_nothing_else(tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "step"
    saved = write_dcp_checkpoint(folder)
    file = folder / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - cut)
    header = read_header(folder)
    assert "integrity.truncated" in errors_of(header)
    readable = [t for t in header.tensors if t.is_readable]
    assert 0 < len(readable) < len(header.tensors)
    for tensor in (t for t in readable if t.section is Section.MODEL):
        assert load_tensor(header, tensor.name).equal(saved["model_state_dict"][tensor.name])
    lost = next(t for t in header.tensors if not t.is_readable)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensor(header, lost.name)


def test_a_data_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write_dcp_checkpoint(tmp_path / "step")
    (tmp_path / "step" / "__0_0.distcp").unlink()
    assert "integrity.truncated" in errors_of(read_header(tmp_path / "step"))


# tiling


def test_only_boxes_that_cover_a_tensor_exactly_are_believed() -> None:
    rows = [((0, 0), (2, 4)), ((2, 0), (1, 4))]
    quarters = [((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]
    assert is_grid((3, 4), rows)
    assert is_in_row_order((3, 4), rows)
    assert is_grid((4, 6), quarters)
    assert not is_in_row_order((4, 6), quarters)
    assert is_grid((), [((), ())])
    assert is_grid((0, 3), [((0, 0), (0, 3))])
    assert not is_grid((3, 4), rows[:1])
    assert not is_grid((3, 4), [*rows, rows[0]])
    assert not is_grid((3, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))])
    assert not is_grid((4, 6), quarters[:3])
    assert not is_grid((4,), rows)
    assert is_in_row_order((1, 4), [((0, 0), (1, 2)), ((0, 2), (1, 2))])


# torch shards


def test_torch_shards_are_one_checkpoint(tmp_path: Path) -> None:
    state = trained_small_checkpoint()["model_state_dict"]
    write_torch_shards(tmp_path / "model", state)
    for path in (tmp_path / "model", tmp_path / "model" / "pytorch_model.bin.index.json"):
        header = read_header(path)
        assert (header.format, {t.name for t in header.tensors}) == ("torch_sharded", set(state))
        assert header_findings(header) == []
        for name, tensor in state.items():
            assert load_tensor(header, name).equal(tensor)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_found(tmp_path: Path) -> None:
    state = trained_small_checkpoint()["model_state_dict"]
    weight_map = write_torch_shards(tmp_path / "model", state)
    name, file = next(iter(weight_map.items()))
    shard = torch.load(tmp_path / "model" / file)
    del shard[name]
    torch.save(shard, tmp_path / "model" / file)
    assert errors_of(read_header(tmp_path / "model")) == {"integrity.shard_mismatch"}
    (tmp_path / "model" / file).unlink()
    with pytest.raises(TruncatedCheckpointError, match="does not exist"):
        read_header(tmp_path / "model")


def test_shards_may_be_links_as_in_a_hubs_cache(tmp_path: Path) -> None:
    state = trained_small_checkpoint()["model_state_dict"]
    write_torch_shards(tmp_path / "model", state)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "model").glob("*.bin"))):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert read_header(tmp_path / "model").entry_count == len(state)


# Lightning, wrappers, averages


def test_a_lightning_checkpoint_is_unwrapped_in_full(tmp_path: Path) -> None:
    whole, _ = lightning_checkpoint()
    torch.save(whole, tmp_path / "epoch=4.ckpt")
    header = read_header(tmp_path / "epoch=4.ckpt")
    assert (header.state_path, header.state_guessed, header.entry_count) == ("state_dict", False, 11)
    assert (header.scalars["epoch"], header.scalars["global_step"]) == (4, 1250)
    assert header.config == {"learning_rate": 1e-3, "width": 8}
    assert header.scheduler == [{"T_max": 50, "last_epoch": 5, "_last_lr": [0.0009]}]
    assert header.plain["MixedPrecision"]["scale"] == 65536.0
    (callback, *_) = header.plain["callbacks"].values()
    assert callback["monitor"] == "val_loss"
    optimizer = header.optimizer
    assert optimizer is not None
    assert (optimizer.path, optimizer.mapping) == ("optimizer_states/0", "by_order")
    assert optimizer.parameters["0"] == "net.embedding.weight"
    assert len(optimizer.parameters) == 8
    moments = [t for t in header.tensors if t.section is Section.OPTIMIZER]
    assert len(moments) == 24
    assert header_findings(header) == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_names_are_unwrapped_for_the_optimizer_too(tmp_path: Path, prefix: str) -> None:
    trained = trained_small_checkpoint()
    names = [n for n, _ in SmallNet().named_parameters()]
    optimizer = trained["optimizer_state_dict"]
    by_name = {f"{prefix}{names[i]}": s for i, s in optimizer["state"].items()}
    group = {**optimizer["param_groups"][0], "params": list(by_name)}
    state = OrderedDict((f"{prefix}{n}", t) for n, t in trained["model_state_dict"].items())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.save(
        {"model": state, "optimizer": {"state": by_name, "param_groups": [group]}, "scaler": scaler.state_dict()},
        tmp_path / "c.pt",
    )
    header = read_header(tmp_path / "c.pt")
    assert "head.weight" in {t.name for t in header.model_tensors()}
    assert header.optimizer is not None
    assert header.optimizer.mapping == "by_name"
    assert set(header.optimizer.parameters.values()) == set(names)
    assert header.plain["scaler"]["scale"] == 1024.0


def test_an_averaged_model_is_a_section_of_its_own(tmp_path: Path) -> None:
    model = SmallNet()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"model": model.state_dict(), "ema": averaged.state_dict()}, tmp_path / "c.pt")
    header = read_header(tmp_path / "c.pt")
    average = [t for t in header.tensors if t.section is Section.AVERAGE]
    assert (header.state_path, len(average)) == ("model", 1 + header.entry_count)


# DeepSpeed


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_partitions_are_put_together_beside_the_served_weights(
    tmp_path: Path, stage: int, ranks: int
) -> None:
    weights = write_deepspeed_checkpoint(tmp_path / "run", stage, ranks)
    masters, moments = deepspeed_run()
    for folder in (tmp_path / "run", tmp_path / "run" / "global_step30"):
        header = read_header(folder)
        assert (header.format, header.state_path) == ("deepspeed", "module")
        for name, tensor in weights.items():
            assert load_tensor(header, name.replace("module.", "", 1)).equal(tensor)
            assert load_tensor(header, f"optimizer/state/{name}/master_param").equal(masters[name])
            for moment, value in moments[name].items():
                assert load_tensor(header, f"optimizer/state/{name}/{moment}").equal(value)
        assert header.config["train_batch_size"] == 8
        assert header.scalars["global_steps"] == 30
        assert header.optimizer is not None
        assert (header.optimizer.kind, header.optimizer.mapping, header.optimizer.steps) == (
            "Adam or AdamW",
            "by_name",
            (5,),
        )
        assert header_findings(header) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_model_of_zero_stage_3_is_put_together_from_all_ranks(tmp_path: Path, ranks: int) -> None:
    write_deepspeed_checkpoint(tmp_path / "run", 3, ranks)
    masters, moments = deepspeed_run()
    header = read_header(tmp_path / "run")
    assert {f"module.{t.name}": t.shape for t in header.model_tensors()} == {n: t.shape for n, t in masters.items()}
    for name, tensor in masters.items():
        own = name.replace("module.", "", 1)
        assert load_tensor(header, own).equal(tensor)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(iter_tensor_bytes(header, own, 16)) == raw
        for moment, value in moments[name].items():
            assert load_tensor(header, f"optimizer/state/{name}/{moment}").equal(value)
    assert header.parameter_count == sum(t.numel() for t in masters.values())
    assert header_findings(header) == []


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_that_is_a_member_of_deepspeeds_enumeration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    module = "deepspeed.runtime.zero.config"
    for depth in range(1, 5):
        name = ".".join(module.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stages = enum.IntEnum("ZeroStageEnum", {"gradients": 2, "weights": 3}, module=module)
    sys.modules[module].ZeroStageEnum = stages  # type: ignore[attr-defined]
    write_deepspeed_checkpoint(tmp_path / "run", stage)
    edited(tmp_path / "run", "*_optim_states.pt", lambda p: p["optimizer_state_dict"].update(zero_stage=stages(stage)))
    header = read_header(tmp_path / "run")
    assert header_findings(header) == []
    assert any(f"ZeRO stage {stage}" in note and "put together" in note for note in header.notes)


def edited(folder: Path, pattern: str, change: Callable[[Any], None]) -> Path:
    """The checkpoint after `change` on every file of a pattern."""
    for path in folder.rglob(pattern):
        loaded = torch.load(path, weights_only=True)
        change(loaded)
        torch.save(loaded, path)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(param_shapes=[{n: (*s, 2) for n, s in m["param_shapes"][0].items()}]),
        lambda m: m.update(param_shapes=[dict(list(m["param_shapes"][0].items())[1:])]),
        lambda m: m.update(param_shapes=[dict.fromkeys(m["param_shapes"][0], (1 << 40, 1 << 40))]),
        lambda m: m.update(param_shapes=[dict.fromkeys(m["param_shapes"][0], (-1,))]),
        lambda m: m.update(param_shapes=None),
        lambda m: m.update(param_shapes=[[], 5]),
        lambda m: m.pop("param_shapes"),
    ],
)
def test_partitions_that_do_not_fit_the_shapes_stay_flat_and_say_why(
    tmp_path: Path, stage: int, change: Callable[[Any], None]
) -> None:
    write_deepspeed_checkpoint(tmp_path / "run", stage)
    header = read_header(edited(tmp_path / "run", "*_model_states.pt", change))
    flat = [t for t in header.tensors if t.section is Section.OPTIMIZER]
    assert len(flat) == 2 * 3
    assert any("not matched to parameters" in note for note in header.notes)
    assert (header.parameter_count == 0) is (stage == 3)


def test_moments_that_a_rank_lacks_are_left_out_and_the_weights_are_not(tmp_path: Path) -> None:
    write_deepspeed_checkpoint(tmp_path / "run", 3)

    def without(partition: Any) -> None:
        del partition["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg_sq"]

    header = read_header(edited(tmp_path / "run", "*rank_1*_optim_states.pt", without))
    assert header.parameter_count > 0
    assert [t for t in header.tensors if t.name.endswith("exp_avg_sq")] == []
    assert [t for t in header.tensors if t.name.endswith("exp_avg")] != []


def test_a_missing_partition_of_the_optimizer_is_found(tmp_path: Path) -> None:
    write_deepspeed_checkpoint(tmp_path / "run")
    (partition, *_) = sorted((tmp_path / "run").rglob("*rank_1*optim_states.pt"))
    whole = partition.read_bytes()
    partition.write_bytes(whole[:50])
    assert errors_of(read_header(tmp_path / "run")) == {"integrity.shard_incomplete"}
    partition.unlink()
    assert errors_of(read_header(tmp_path / "run")) == {"integrity.shard_incomplete"}


# folders


def test_a_folder_of_no_known_layout_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointIsDirectoryError, match=r"\.metadata"):
        read_header(tmp_path)


def test_a_folder_of_two_layouts_says_which_is_read(tmp_path: Path) -> None:
    write_dcp_checkpoint(tmp_path / "both")
    write_torch_shards(tmp_path / "both", {"w": torch.ones(2), "b": torch.ones(2)})
    header = read_header(tmp_path / "both")
    assert header.format == "torch_dcp"
    assert any("another checkpoint" in note for note in header.notes)


def test_a_folders_fingerprint_changes_with_any_of_its_files(tmp_path: Path) -> None:
    write_deepspeed_checkpoint(tmp_path / "run")
    header = read_header(tmp_path / "run")
    now = fingerprint_of(str(tmp_path / "run"))
    assert now is not None
    assert header.fingerprint == (now.size, now.mtime_ns, now.inode)
    with next((tmp_path / "run").rglob("*_optim_states.pt")).open("ab") as file:
        file.write(b"x")
    changed = fingerprint_of(str(tmp_path / "run"))
    assert changed is not None
    assert changed != now


def test_the_command_line_reads_a_folder(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_dcp_checkpoint(tmp_path / "step")
    assert main([str(tmp_path / "step")]) == 0
    assert b"torch_dcp" in capfdbinary.readouterr().out


def test_the_allow_list_is_printed_and_holds_what_real_files_name(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["--allow-list"]) == 0
    allowed = set(capfdbinary.readouterr().out.decode().split())
    assert "os.system" not in allowed
    assert not {n for n in allowed if n.startswith(("builtins.eval", "posix.", "subprocess."))}
    write_dcp_checkpoint(tmp_path / "step")
    named = {g.name for g in read_header(tmp_path / "step").globals}
    assert named <= allowed


# files that change


def test_a_file_cut_short_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save({"w": nn.Linear(100, 100).state_dict()["weight"]}, file)
    header = read_header(file)
    os.truncate(file, 2000)
    for read in (load_tensor, map_tensor, lambda h, n: list(iter_tensor_bytes(h, n))):
        with pytest.raises(TruncatedCheckpointError):
            read(header, "w")
    with pytest.raises(TruncatedCheckpointError):
        load_tensor(header, "w", copy=False)


# the oldest Python


@pytest.mark.parametrize("python", interpreters())
def test_every_python_without_torch_reads_every_fixture_alike(tmp_path: Path, python: str) -> None:
    paths = all_fixture_folders_and_files(tmp_path)
    root = Path(__file__).parents[2]
    code = (
        "import json, sys\nsys.path.insert(0, sys.argv[1])\n"
        "from remote_payload.checkpoint import read_header\n"
        "print(json.dumps([read_header(p).to_json() for p in sys.argv[2:]]))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([python, "-I", "-c", code, str(root), *map(str, paths)], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    theirs = json.loads(done.stdout)
    ours = json.loads(json.dumps([read_header(p).to_json() for p in paths]))
    assert [h["format"] for h in theirs] == [h["format"] for h in ours]
    assert theirs == ours
