from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from remote_payload.checkpoint import read_header
from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.reconstruct.loading import StructureError, choose_dtype, load_model
from remote_payload.reconstruct.protocol import AdapterBase, AdapterConfig

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embedding.weight


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.plain = torch.ones(2)


class Adapter(AdapterBase):
    def __init__(self, make: Any, names: Mapping[str, str | None] | None = None, finish: Any = None) -> None:
        self.make, self.names, self.finish = make, names, finish

    def build_model(self, config: AdapterConfig) -> nn.Module:
        module: nn.Module = self.make()
        return module

    def map_state_dict(self, names: Sequence[str]) -> Mapping[str, str | None]:
        return self.names if self.names is not None else super().map_state_dict(names)

    def finish_model(self, model: Any) -> None:
        if self.finish:
            self.finish(model)

    def modalities(self, data: Mapping[str, str], config: AdapterConfig) -> Any:
        return ()

    def samples(self, split: str, data: Mapping[str, str], config: AdapterConfig) -> Any:
        return ()

    def predict(self, model: Any, batch: Any) -> Any:
        return {}


def load(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(adapter, AdapterConfig(), read_header(path), CPU, dtype)


def saved(tmp_path: Path, state: Any) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    return path


def trained() -> Net:
    torch.manual_seed(1)
    net = Net()
    net(torch.rand(8, 4))
    return net


def findings(adapter: Adapter, path: Path) -> dict[str, Any]:
    with pytest.raises(StructureError) as caught:
        load(adapter, path)
    return {f.id: f for f in caught.value.findings}


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    net = trained()
    loaded = load(Adapter(Net), saved(tmp_path, net.state_dict()))
    x = torch.rand(5, 4)
    torch.testing.assert_close(loaded.model(x), net.eval()(x), rtol=0, atol=0)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_batchnorm_statistics_and_counters_come_from_the_file(tmp_path: Path) -> None:
    net = trained()
    loaded = load(Adapter(Net), saved(tmp_path, net.state_dict())).model
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(loaded.norm, name), getattr(net.norm, name), rtol=0, atol=0)
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_wrappers_prefixes_do_not_matter(tmp_path: Path) -> None:
    state = {f"module.{name}": t for name, t in trained().state_dict().items()}
    assert load(Adapter(Net), saved(tmp_path, state)).entries == 9


def test_a_missing_entry_is_refused_by_name(tmp_path: Path) -> None:
    state = trained().state_dict()
    del state["norm.running_var"]
    found = findings(Adapter(Net), saved(tmp_path, state))
    assert found["structure.missing_entries"].where == ("norm.running_var",)


def test_an_unexpected_entry_is_refused_by_name(tmp_path: Path) -> None:
    state = {**trained().state_dict(), "extra.weight": torch.ones(2, 2)}
    assert findings(Adapter(Net), saved(tmp_path, state))["structure.unexpected_entries"].where == ("extra.weight",)


def test_an_entry_dropped_on_purpose_is_not_unexpected(tmp_path: Path) -> None:
    state = {**trained().state_dict(), "extra.weight": torch.ones(2, 2)}
    loaded = load(Adapter(Net, names={"extra.weight": None}), saved(tmp_path, state))
    assert loaded.fit.dropped == ("extra.weight",)


def test_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    found = findings(Adapter(lambda: Net(7)), saved(tmp_path, trained().state_dict()))["structure.shape_mismatch"]
    assert "first.weight" in found.where
    assert {"name": "first.weight", "model": [7, 4], "checkpoint": [6, 4]} in found.evidence["entries"]


def test_two_entries_for_one_parameter_are_refused(tmp_path: Path) -> None:
    state = {**trained().state_dict(), "again.weight": torch.ones(6, 4)}
    found = findings(Adapter(Net, names={"again.weight": "first.weight"}), saved(tmp_path, state))
    assert found["structure.ambiguous_entries"].where == ("first.weight",)


def test_names_are_mapped(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["input.weight"] = state.pop("first.weight")
    assert load(Adapter(Net, names={"input.weight": "first.weight"}), saved(tmp_path, state)).entries == 9


@pytest.mark.parametrize("drop", [None, "embedding.weight", "head.weight"])
def test_tied_weights_stay_one_tensor_whichever_name_was_saved(tmp_path: Path, drop: str | None) -> None:
    state = Tied().state_dict()
    if drop is not None:
        del state[drop]
    loaded = load(Adapter(Tied), saved(tmp_path, state))
    assert loaded.model.head.weight is loaded.model.embedding.weight
    assert loaded.tied == 1
    assert loaded.parameters == 45


def test_a_buffer_that_no_checkpoint_holds_is_refused_until_it_is_filled(tmp_path: Path) -> None:
    path = saved(tmp_path, WithTable().state_dict())
    assert findings(Adapter(WithTable), path)["structure.uninitialised"].where == ("plain", "table")

    def fill(model: WithTable) -> None:
        model.table = torch.arange(3.0)
        model.plain = torch.ones(2)

    assert load(Adapter(WithTable, finish=fill), path).model.table.tolist() == [0.0, 1.0, 2.0]


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.pt"
    torch.save({"epoch": 3, "note": "nothing"}, path)
    assert "structure.no_model" in findings(Adapter(Net), path)


def test_dtype_auto_is_the_commonest_stored_one_but_no_float16_on_a_cpu(tmp_path: Path) -> None:
    for stored, wanted in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        header = read_header(saved(tmp_path, Net().to(stored).state_dict()))
        assert choose_dtype("auto", header, CPU) == wanted
    assert choose_dtype("float32", header, CPU) == torch.float32


def test_every_floating_tensor_gets_the_chosen_type_and_counters_keep_theirs(tmp_path: Path) -> None:
    loaded = load(Adapter(Net), saved(tmp_path, trained().state_dict()), torch.bfloat16).model
    assert {t.dtype for n, t in loaded.state_dict().items() if "num_batches" not in n} == {torch.bfloat16}
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_writing_to_the_loaded_model_does_not_touch_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, trained().state_dict())
    before = path.read_bytes()
    loaded = load(Adapter(Net), path)
    with torch.no_grad():
        loaded.model.first.weight.zero_()
    assert path.read_bytes() == before


def test_building_the_full_size_model_costs_no_memory() -> None:
    from remote_payload.reconstruct.loading import build_on_meta
    from remote_payload.reference.model import FilmAutoencoder
    from remote_payload.reference.sizes import ReferenceSizes

    model = build_on_meta(Adapter(lambda: FilmAutoencoder(ReferenceSizes.at_scale(1))), AdapterConfig())
    assert all(p.is_meta for p in model.parameters())


def test_a_huggingface_folder_of_several_shards_fills_the_model(tmp_path: Path) -> None:
    net = trained()
    names = sorted(net.state_dict())
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, kept in shards.items():
        save_file({name: net.state_dict()[name] for name in kept}, tmp_path / shard, metadata={"format": "pt"})
    places = {name: shard for shard, kept in shards.items() for name in kept}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Net"]}))
    # Code beside the weights is never looked at.
    (tmp_path / "modeling_net.py").write_text("raise SystemExit('this must not run')")
    loaded = load(Adapter(Net), tmp_path)
    x = torch.rand(5, 4)
    torch.testing.assert_close(loaded.model(x), net.eval()(x), rtol=0, atol=0)
    places.pop(names[0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((StructureError, CheckpointError)):
        load(Adapter(Net), tmp_path)
