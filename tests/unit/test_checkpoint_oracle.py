"""Our reader against torch's own, tensor by tensor, and against safetensors' writer."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from remote_payload.checkpoint import CheckpointHeader, Role, Section, header_findings, read_header
from remote_payload.checkpoint.tensor_bytes import iter_tensor_bytes
from remote_payload.checkpoint.torch_tensors import load_tensor
from tests.support.checkpoints import (
    REFERENCE_ENTRIES,
    REFERENCE_PARAMETERS,
    reference_checkpoint,
    reference_shapes,
    trained_small_checkpoint,
    write_sparse_reference,
)


def flatten(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for key, item in items:
        found.update(flatten(item, (*path, str(key))))
    return found


def assert_same_tensors(header: CheckpointHeader, expected: Any) -> None:
    oracle = flatten(expected)
    names = {
        (header.state_path + "/" if t.section is Section.MODEL and header.state_path else "")
        + (t.key if t.section is Section.MODEL else t.name): t
        for t in header.tensors
    }
    assert set(names) == {"/".join(p) for p in oracle}
    for path, tensor in oracle.items():
        entry = names["/".join(path)]
        ours = load_tensor(header, entry.name)
        assert (entry.dtype, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert not entry.is_dense or ours.stride() == tensor.stride()
        assert entry.stride == tensor.stride()
        assert ours.dtype == tensor.dtype
        assert ours.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tensor_of_a_trained_checkpoint_is_torchs(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(dtype), path, _use_new_zipfile_serialization=zipped)
    header = read_header(path)
    assert header.problems == ()
    assert_same_tensors(header, torch.load(path, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_gives_the_same_header(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), path, pickle_protocol=protocol)
    header = read_header(path)
    assert header.problems == ()
    assert (header.entry_count, header.optimizer and header.optimizer.kind) == (11, "AdamW")
    assert_same_tensors(header, torch.load(path, weights_only=False))


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
    ],
)
def test_every_element_type_is_read(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "c.pt"
    bits = torch.arange(64, dtype=torch.uint8)
    value = (bits % 2 == 0) if dtype == "bool" else bits.view(getattr(torch, dtype))
    torch.save({"a": value, "b": value[:2]}, path)
    header = read_header(path)
    assert header.problems == ()
    assert_same_tensors(header, torch.load(path, weights_only=True))


def test_views_are_read_as_views(tmp_path: Path) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    views = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:3, ::2, 1],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "overlapping": torch.arange(6.0).unfold(0, 3, 1),
        "scalar": base[2, 3, 4],
        "empty": torch.empty(0, 7),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "c.pt"
    torch.save(views, path)
    header = read_header(path)
    assert header.problems == ()
    assert_same_tensors(header, torch.load(path, weights_only=True))
    assert {t.name for t in header.tensors if not t.is_dense} == {"slice", "expanded", "overlapping"}


def random_tree(chance: random.Random, depth: int) -> Any:
    kind = chance.choice(["tensor", "tensor", "dict", "list", "number", "text", "parameter", "tuple"])
    if depth > 3 or kind == "number":
        return chance.choice([1, -(2**40), 0.5, True, None, math.inf, 2**70])
    if kind == "text":
        return chance.choice(["", "é\u202e", "x" * 300])
    if kind in ("tensor", "parameter"):
        value = torch.randn([chance.randint(0, 3) for _ in range(chance.randint(0, 3))])
        return torch.nn.Parameter(value) if kind == "parameter" else value
    children = [random_tree(chance, depth + 1) for _ in range(chance.randint(0, 4))]
    if kind == "dict":
        return {f"k{i}": c for i, c in enumerate(children)}
    return tuple(children) if kind == "tuple" else children


def test_random_trees_agree_with_torch(tmp_path: Path) -> None:
    for seed in range(25):
        chance = random.Random(seed)
        torch.manual_seed(seed)
        path = tmp_path / f"{seed}.pt"
        tree = {f"top{i}": random_tree(chance, 0) for i in range(6)}
        torch.save(tree, path, pickle_protocol=chance.choice([2, 4]))
        header = read_header(path)
        assert header.problems == ()
        loaded = flatten(torch.load(path, weights_only=False))
        assert len(header.tensors) == len(loaded)
        assert sorted(t.shape for t in header.tensors) == sorted(tuple(t.shape) for t in loaded.values())
        sums = sorted(float(load_tensor(header, t.name).sum()) for t in header.tensors)
        assert sums == sorted(float(t.sum()) for t in loaded.values())


def test_safetensors_agree_with_their_writer(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).bfloat16(), "n": torch.tensor(7)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    for place in (path, tmp_path):
        header = read_header(place)
        assert header.problems == ()
        assert header.format == "safetensors"
        assert_same_tensors(header, tensors)
    assert header.tensor("n").value == 7


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(3, 2)}, tmp_path / "model-00002-of-00002.safetensors")
    index = '{"weight_map": {"b.weight": "model-00002-of-00002.safetensors",'
    (tmp_path / "model.safetensors.index.json").write_text(index + '"a.weight": "model-00001-of-00002.safetensors"}}')
    header = read_header(tmp_path)
    assert [t.name for t in header.tensors] == ["b.weight", "a.weight"]
    assert load_tensor(header, "a.weight").equal(torch.ones(2, 2))
    assert load_tensor(header, "b.weight").equal(torch.zeros(3, 2))
    assert header.problems == ()


def test_the_sparse_reference_file_has_its_exact_figures_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    write_sparse_reference(path)
    assert path.stat().st_size > 21_000_000_000
    assert path.stat().st_blocks * 512 < 4_000_000
    code = (
        "import sys; from remote_payload.checkpoint.__main__ import main; status = main(sys.argv[1:]);"
        "loaded = {'torch', 'numpy', 'pickle', 'orchestrator'} & set(sys.modules);"
        "print('loaded:', sorted(loaded)); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    words = " ".join(result.stdout.split())
    assert f"entries {REFERENCE_ENTRIES} " in words
    assert f"parameters {REFERENCE_PARAMETERS:,} " in words
    for row in ("BatchNorm layers 22", "weight matrices 26", "norm scales (gamma) 22", "norm shifts included 48"):
        assert row in words
    assert "running statistics 44 counters 22 other 0" in words
    assert words.endswith("loaded: []")
    header = read_header(path)
    assert {t.name: t.shape for t in header.model_tensors()} == reference_shapes()
    assert header.problems == ()
    assert header.bytes.model + header.bytes.optimizer == sum(t.nbytes or 0 for t in header.tensors)


def test_small_reference_counts_and_scalars(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), path)
    header = read_header(path)
    assert header.entry_count == 162
    assert header.optimizer is not None
    assert header.optimizer.mapping == "by_order"
    assert header.optimizer.steps == (1363.0,)
    assert len(header.optimizer.parameters) == 96
    assert header.scalars == {"epoch": 29, "global_step": 1363, "best_val_loss": 167.15, "val_loss": 167.15}
    assert header.config["warmup_epochs"] == 10
    assert {k: len(v) for k, v in header.histories.items()} == {"train_history": 29, "val_history": 29}
    counters = [t.value for t in header.tensors if t.role is Role.COUNTER]
    assert counters == [1363] * 22


def test_a_tensors_bytes_come_in_blocks_of_the_asked_size(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    value = torch.randn(1000)
    torch.save({"w": value}, path)
    blocks = list(iter_tensor_bytes(read_header(path), "w", block_bytes=768))
    assert [len(b) for b in blocks] == [768] * 5 + [160]
    assert b"".join(blocks) == bytes(value.view(torch.uint8).tolist())


def test_a_loaded_tensor_can_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"w": torch.zeros(10)}, path)
    before = path.read_bytes()
    tensor = load_tensor(read_header(path), "w")
    tensor += 1
    assert tensor.sum() == 10
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("wrap", "path", "removed"),
    [
        (lambda s: s, "", ()),
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict", ()),
        (lambda s: {"model": {"module." + k: v for k, v in s.items()}}, "model", ("module.",)),
        (lambda s: {"model": {"_orig_mod.module." + k: v for k, v in s.items()}}, "model", ("_orig_mod.", "module.")),
        (lambda s: {"state": {"model": s}, "model": {"state_dict": s}}, "model/state_dict", ()),
        (lambda s: {"module": s, "ema": {k: v.clone() for k, v in s.items()}}, "module", ()),
        (lambda s: {"model_ema": s}, "model_ema", ()),
    ],
    ids=["bare", "lightning", "ddp", "compiled", "nested", "with_average", "average_alone"],
)
def test_usual_wrappers_are_unwrapped(tmp_path: Path, wrap: Any, path: str, removed: tuple[str, ...]) -> None:
    state = trained_small_checkpoint()["model_state_dict"]
    file = tmp_path / "c.pt"
    torch.save(wrap(state), file)
    header = read_header(file)
    assert [t.name for t in header.model_tensors()] == list(state)
    assert (header.state_path, header.state_guessed) == (path, False)
    assert set(header.removed_prefixes) == set(removed)


def test_an_unknown_layout_takes_the_largest_mapping_and_says_so(tmp_path: Path) -> None:
    state = trained_small_checkpoint()["model_state_dict"]
    file = tmp_path / "c.pt"
    torch.save({"zeug": {"little": {"a": torch.ones(1)}, "gewichte": state}, "epoch": 1}, file)
    header = read_header(file)
    assert [t.name for t in header.model_tensors()] == list(state)
    assert header.state_guessed
    assert any("zeug/gewichte" in n for n in header.notes)


def test_roles_of_a_net_with_every_kind_of_layer(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), file)
    roles = {t.name: t.role for t in read_header(file).model_tensors()}
    assert roles == {
        "embedding.weight": Role.EMBEDDING,
        "first.weight": Role.WEIGHT_MATRIX,
        "first.bias": Role.BIAS,
        "norm.weight": Role.NORM_SCALE,
        "norm.bias": Role.NORM_SHIFT,
        "norm.running_mean": Role.RUNNING_MEAN,
        "norm.running_var": Role.RUNNING_VAR,
        "norm.num_batches_tracked": Role.COUNTER,
        "layer_norm.weight": Role.NORM_SCALE,
        "layer_norm.bias": Role.NORM_SHIFT,
        "head.weight": Role.WEIGHT_MATRIX,
    }


def test_groups_with_and_without_decay_are_matched_to_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.Adam([{"params": decay, "weight_decay": 0.1}, {"params": rest}])
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    file = tmp_path / "c.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    facts = read_header(file).optimizer
    assert facts is not None
    assert facts.mapping == "by_order_matrices_first"
    names = ["0.weight", "2.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert facts.parameters == {str(i): n for i, n in enumerate(names)}
    assert facts.kind == "Adam"


def test_tied_weights_count_once_and_the_optimizer_still_matches(tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(5, 4)
    head = torch.nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(OrderedDict(embedding=embedding, head=head))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    file = tmp_path / "c.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    header = read_header(file)
    assert (header.entry_count, header.parameter_count) == (2, 20)
    assert header.optimizer is not None
    assert header.optimizer.parameters == {"0": "embedding.weight"}


def test_plain_values_of_common_config_types_are_shown_and_not_suspected(tmp_path: Path) -> None:
    import argparse
    import pathlib

    import numpy

    file = tmp_path / "c.pt"
    args = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("a/b"), sizes=[1, 2], best=numpy.float64(0.25))
    torch.save(
        {
            "state_dict": {"w": torch.ones(2, 2)},
            "args": args,
            "loss": numpy.float32(math.nan),
            "curve": numpy.array([0.5, 1.5]),
            "best_val_loss": torch.tensor(167.15),
        },
        file,
    )
    header = read_header(file)
    assert header_findings(header) == []
    assert header.config["lr"] == 0.1
    assert header.config["best"] == 0.25
    assert header.scalars["loss"] == "NaN"
    assert header.scalars["best_val_loss"] == pytest.approx(167.15, rel=1e-6)
    assert header.histories["curve"] == [0.5, 1.5]


def test_a_pickled_module_is_read_but_named_as_code(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model, file)
    header = read_header(file)
    assert [t.name for t in header.model_tensors()] == list(model.state_dict())
    assert load_tensor(header, "0.weight").equal(model[0].weight.data)


def test_a_torchscript_archive_is_read_without_suspicion(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.jit.script(model).save(str(file))
    header = read_header(file)
    assert header_findings(header) == []
    assert {t.name for t in header.model_tensors()} == set(model.state_dict())
    assert load_tensor(header, "0.weight").equal(model[0].weight.data)


def test_big_endian_files_give_the_same_numbers(tmp_path: Path) -> None:
    import zipfile

    file, turned = tmp_path / "little.pt", tmp_path / "big.pt"
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(258)}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(turned, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            width = {"data/0": 4, "data/1": 8}.get(info.filename.partition("/")[2])
            if width:
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else data)
    header = read_header(turned)
    assert header.byte_order == "big"
    assert header.tensor("n").value == 258
    assert load_tensor(header, "w").equal(torch.arange(6.0).reshape(2, 3))
    assert load_tensor(header, "n").item() == 258
