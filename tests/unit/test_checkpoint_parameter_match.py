"""Optimizer entries against parameters: the names that torch's optimizers really held, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from remote_payload.checkpoint import read_header
from remote_payload.checkpoint.parameter_match import Entry, Parameter, match_optimizers
from remote_payload.health.scan import scan
from tests.support.health_plants import examined, findings_of

WIDTH, WORDS = 16, 40
Split = Callable[[nn.Module], list[list[str]]]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, 8, 8)))
        self.register_buffer("masked_bias", torch.tensor(-1e4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.ln_1(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Language(nn.Module):
    """GPT-2's habits: the output layer is the embedding, masks and frequencies stand among the weights."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(8, WIDTH)
        self.relative_attention_bias = nn.Embedding(8, 1)
        self.h = nn.ModuleList([Layer(), Layer(), Layer()])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(WIDTH) / WIDTH))
        self.register_buffer("position_ids", torch.arange(8))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.wte(words) * (1 + self.relative_attention_bias.weight) + self.wpe.weight
        for layer in self.h:
            x = layer(x)
        out: Tensor = self.lm_head(self.ln_f(x))
        return out


def names(model: nn.Module, keep: Callable[[str], bool] = lambda _: True) -> list[str]:
    return [n for n, p in model.named_parameters() if keep(n)]


def huggingface(model: nn.Module) -> list[list[str]]:
    """The trainer's two groups; `bias` in a name is enough for no decay, as in T5's relative_attention_bias."""

    def decays(name: str) -> bool:
        return "bias" not in name and "ln_" not in name

    return [names(model, decays), names(model, lambda n: not decays(n))]


def layer_decay(model: nn.Module) -> list[list[str]]:
    """timm's: a group for each layer and kind."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        layer = ".".join(name.split(".")[:2]) if name.startswith("h.") else name[:2]
        groups.setdefault((layer, parameter.dim() > 1), []).append(name)
    return list(groups.values())


SPLITS: dict[str, tuple[Split, str]] = {
    "all": (lambda m: [names(m)], "by_order"),
    "transformers": (huggingface, "by_order_in_groups"),
    "timm": (
        lambda m: [
            [n for n, p in m.named_parameters() if p.dim() <= 1],
            [n for n, p in m.named_parameters() if p.dim() > 1],
        ],
        "by_order_vectors_first",
    ),
    "timm with layer decay": (layer_decay, "by_order_of_kinds"),
    "embeddings frozen": (lambda m: [names(m, lambda n: n.startswith(("h.", "ln_f")))], "by_order"),
    "one layer alone": (lambda m: [names(m, lambda n: n.startswith("wpe"))], "by_order"),
}


def trained(model: nn.Module, groups: list[list[str]]) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in g]} for g in groups], lr=1e-3)
    words = torch.randint(0, WORDS, (4, 8))
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(model(words).square().mean())
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": 2}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_entry_is_known_by_the_name_that_it_had_in_the_optimizer(tmp_path: Path, split: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = Language(tied)
    groups = SPLITS[split][0](model)
    path = tmp_path / "language.pt"
    torch.save(trained(model, groups), path)
    header = read_header(str(path))
    assert header.optimizer is not None
    truth = dict(enumerate(n for g in groups for n in g))
    assert header.optimizer.parameters == {str(i): n for i, n in truth.items()}
    assert header.optimizer.mapping == SPLITS[split][1]
    result = scan(header, "cpu", lambda _done, _total: None)
    assert result.joint.keys() == set(truth.values())
    assert [f["id"] for f in examined(path)["findings"] if f["severity"] != "info"] == []


def test_layers_that_look_like_frozen_ones_are_left_unmatched_and_the_others_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Language()
    chosen = names(model, lambda n: n.startswith(("wpe", "h.1.", "h.2.")))
    path = tmp_path / "frozen.pt"
    torch.save(trained(model, [chosen]), path)
    header = read_header(str(path))
    assert header.optimizer is not None
    assert (header.optimizer.mapping, header.optimizer.parameters) == ("partly_by_order", {"0": "wpe.weight"})
    assert any("1 of 17 optimizer entries have one place alone" in note for note in header.notes)
    assert [f for f in findings_of(examined(path), "optimizer.missing_state") if "no part of" in f["title"]] == []


def test_adapters_over_a_frozen_base_are_matched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Language()
    for layer in model.h:
        layer.lora_A, layer.lora_B = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
    chosen = names(model, lambda n: "lora_" in n)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[n] for n in chosen])
    torch.stack([parameters[n].square().sum() for n in chosen]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    path = tmp_path / "adapted.pt"
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    header = read_header(str(path))
    assert header.optimizer is not None
    assert list(header.optimizer.parameters.values()) == chosen


def entries(shapes: list[tuple[int, ...]], start: int = 0) -> list[Entry]:
    return [Entry(str(start + i), shape) for i, shape in enumerate(shapes)]


def parameters(**shapes: list[tuple[int, ...]]) -> list[Parameter]:
    return [Parameter(f"{part}.{i}", s, (part, i)) for part, found in shapes.items() for i, s in enumerate(found)]


A, B, C = (3, 2), (4, 3), (4,)


def test_two_optimizers_are_matched_each_to_its_part() -> None:
    model = parameters(generator=[A, B, C], discriminator=[C, A])
    for order in ((0, 1), (1, 0)):
        two = [[entries([A, B, C])], [entries([C, A])]]
        found = match_optimizers([two[n] for n in order], model)
        truth = [["generator.0", "generator.1", "generator.2"], ["discriminator.0", "discriminator.1"]]
        assert [list(m.names.values()) for m in found] == [truth[n] for n in order]


def test_twins_are_told_apart_by_nothing_and_matched_to_nothing() -> None:
    model = parameters(first=[A, C], second=[A, C])
    assert [m.names for m in match_optimizers([[entries([A, C])], [entries([A, C])]], model)] == [{}, {}]
    assert [m.names for m in match_optimizers([[entries([A, C])]], model)] == [{}]
    alone = match_optimizers([[entries([A, C])], [entries([A, C])]], parameters(first=[A, C]))
    assert [m.mapping for m in alone] == ["not_derivable", "not_derivable"]


def test_optimizers_that_cover_a_model_in_one_order_only_are_matched_side_by_side() -> None:
    model = parameters(net=[A, A, B, A, A, C])
    found = match_optimizers([[entries([A, A, C])], [entries([A, A, B])]], model)
    assert [list(m.names.values()) for m in found] == [["net.3", "net.4", "net.5"], ["net.0", "net.1", "net.2"]]


def test_whole_parts_in_another_order_are_matched_where_it_is_clear_which_comes_next() -> None:
    model = parameters(encoder=[A, C], norm=[C, C], decoder=[B, C])
    found = match_optimizers([[entries([B, C, C, C, A, C])]], model)[0]
    assert list(found.names.values()) == ["decoder.0", "decoder.1", "norm.0", "norm.1", "encoder.0", "encoder.1"]
    assert found.mapping == "by_order_of_parts"


def test_swapped_moments_are_not_explained_away() -> None:
    model = parameters(body=[A, B, C])
    assert match_optimizers([[entries([B, A, C])]], model)[0].names == {}


shapes = st.sampled_from([A, B, C, (2, 2), (2,), (5,)])


@given(st.lists(st.tuples(shapes, st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 2))
def test_what_is_matched_in_the_models_order_is_never_wrong(drawn: list[tuple[Any, int]], groups: int) -> None:
    """0: frozen and left out; 1 and 2: the groups. One top-level part, so that only order can tell."""
    model = parameters(net=[shape for shape, _ in drawn])
    split = [[i for i, (_, group) in enumerate(drawn) if (min(group, groups)) == g] for g in range(1, groups + 1)]
    order = [i for group in split for i in group]
    made = entries([drawn[i][0] for i in order])
    given_groups, at = [], 0
    for group in split:
        given_groups.append(made[at : at + len(group)])
        at += len(group)
    found = match_optimizers([[g for g in given_groups if g]], model)[0]
    if found.mapping in ("by_order_in_groups", "partly_by_order"):
        assert all(name == f"net.{order[int(index)]}" for index, name in found.names.items())


def test_a_hostile_number_of_groups_and_parts_takes_no_time() -> None:
    model = [Parameter(f"p{i}.w", (i % 3 + 1,), i) for i in range(20_000)]
    groups = [[Entry(str(i), (i % 3 + 1,))] for i in range(1000)]
    assert match_optimizers([groups], model)[0].mapping == "not_derivable"
    assert match_optimizers([[entries([(1,)] * 20_000)]], model)[0].names == {}
