"""Healthy files in the layouts that common libraries write: no warning, no error, whatever their habits.

The models are built here with the names, ties, buffers and wrappers of torchvision, timm, transformers and peft, and
take a few real steps; the same was tried once on files that those libraries wrote themselves.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.health_plants import examined

LAYOUTS: dict[str, Callable[[], Any]] = {}


def layout(build: Callable[[], Any]) -> Callable[[], Any]:
    LAYOUTS[build.__name__] = build
    return build


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Callable[[], Tensor], classes: int, steps: int = 4
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(batch())
        target = torch.randint(0, classes, out.shape[:1])
        torch.autograd.backward(nn.functional.cross_entropy(out, target))
        optimizer.step()


class Block(nn.Module):
    """A residual block of torchvision's; its last scale may start at 0, as zero_init_residual does."""

    def __init__(self, width: int, zero_init: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        if zero_init:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, zero_init: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, zero_init), Block(16, zero_init))
        self.fc = nn.Linear(16, 100)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return out


def pictures() -> Tensor:
    return torch.randn(8, 3, 12, 12)


@layout
def torchvision_reference() -> Any:
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.1)
    train(model, optimizer, pictures, 100)
    schedule.step()
    arguments = argparse.Namespace(lr=0.1, epochs=90, lr_scheduler="steplr", lr_step_size=30, lr_gamma=0.1)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 0,
        "args": arguments,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


@layout
def zero_initialised_residuals() -> Any:
    model = ResNet(zero_init=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, pictures, 100)
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 4}


@layout
def vgg_with_biases_before_its_norms() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 100))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, pictures, 100)
    return {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 1}


class VisionTransformer(nn.Module):
    """timm's names: class token, positions, fused qkv, layer scale."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 10, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, stride=4)})
        self.norm1, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))
        self.head = nn.Linear(width, 100)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, -1)
        tokens = tokens + self.gamma * self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        out: Tensor = self.head(self.norm(tokens[:, 0]))
        return out


@layout
def timm_with_an_average() -> Any:
    model = VisionTransformer()
    average = copy.deepcopy(model)
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    train(model, optimizer, pictures, 100)
    arguments = argparse.Namespace(
        lr=1e-3, epochs=300, sched="cosine", warmup_epochs=5, warmup_lr=1e-6, model_ema_decay=0.9998, batch_size=1
    )
    return {
        "epoch": 0,
        "arch": "vit_tiny",
        "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": arguments,
        "state_dict_ema": average.state_dict(),
        "metric": 1.2,
    }


class LanguageModel(nn.Module):
    """GPT-2's habits: tied output, a mask among the buffers, an unused pooler, a padding row of zeros."""

    def __init__(self, width: int = 32, words: int = 100) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width, padding_idx=0), nn.Embedding(16, width)
        self.ln_1, self.attn, self.ln_f = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.LayerNorm(width)
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, 16, 16)))
        self.register_buffer("masked_bias", torch.tensor(-1e4))
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 16) / 16))
        self.register_buffer("position_ids", torch.arange(16))
        self.pooler = nn.Linear(4, 4)
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.wte(words) + self.wpe.weight
        q, k, v = self.attn(self.ln_1(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.lm_head(self.ln_f(x[:, -1]))
        return out


def sentences() -> Tensor:
    return torch.randint(0, 100, (8, 16))


def language_run(dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, torch.optim.Optimizer]:
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    train(model, optimizer, sentences, 100)
    return model.to(dtype), optimizer


@layout
def transformers_with_its_trainer_state() -> Any:
    model, optimizer = language_run()
    return {
        "model": {f"_orig_mod.{n}": t for n, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "global_step": 4,
        "config": {
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 8,
            "max_steps": 100,
        },
    }


@layout
def transformers_cast_to_bfloat16_for_inference() -> Any:
    return {"state_dict": language_run(torch.bfloat16)[0].state_dict(), "global_step": 4}


@layout
def transformers_cast_to_float16_for_inference() -> Any:
    return language_run(torch.float16)[0].state_dict()


class Adapted(nn.Module):
    """peft's names over a frozen base."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q_proj = nn.ModuleDict(
            {
                "base_layer": nn.Linear(32, 100),
                "lora_A": nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(4, 100, bias=False)}),
            }
        )
        nn.init.zeros_(self.q_proj["lora_B"]["default"].weight)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        down, up = self.q_proj["lora_A"]["default"], self.q_proj["lora_B"]["default"]
        out: Tensor = self.q_proj["base_layer"](y) + up(down(y))
        return out


@layout
def peft_over_a_frozen_base() -> Any:
    model = Adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, optimizer, lambda: torch.randn(8, 32), 100)
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": 4}


@layout
def peft_adapter_before_its_first_step() -> Any:
    return {n: t for n, t in Adapted().state_dict().items() if "lora_" in n}


@layout
def lightning_with_frozen_parts_in_their_own_order() -> Any:
    model = nn.ModuleDict({"encoder": nn.Linear(32, 32), "norm": nn.BatchNorm1d(32), "decoder": nn.Linear(32, 100)})
    ordered = [*model["decoder"].parameters(), *model["norm"].parameters(), *model["encoder"].parameters()]
    optimizer = torch.optim.AdamW(ordered, lr=1e-3)
    chain = nn.Sequential(model["encoder"], model["norm"], nn.ReLU(), model["decoder"])
    train(chain, optimizer, lambda: torch.randn(8, 32), 100)
    return {
        "epoch": 1,
        "global_step": 4,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 1}}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3, "batch_size": 8},
    }


@layout
def untrained() -> Any:
    return {"state_dict": ResNet(zero_init=True).state_dict()}


@layout
def every_type_at_once() -> Any:
    return {
        "a.weight": torch.randn(40, 40),
        "b.weight": torch.randn(40, 40).half(),
        "c.weight": torch.randint(-8, 8, (40, 40)).to(torch.int8),
        "c.scales": torch.rand(40),
        "d.weight": torch.randn(40, 40).to(torch.float8_e4m3fn),
        "mask": torch.full((8, 8), -torch.inf).triu(1),
        "running_var": torch.rand(4) + 0.1,
    }


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_healthy_layout_gets_no_warning_and_no_error(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.pt"
    torch.save(LAYOUTS[name](), path)
    document = examined(path)
    assert [(f["id"], f["title"]) for f in document["findings"] if f["severity"] != "info"] == []
    assert document["verdict"]["dimensions"]["integrity"] == "pass"
    assert document["verdict"]["dimensions"]["numerics"] == "pass"


def test_a_tie_and_an_untrained_model_are_mentioned_for_information(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.pt"
    torch.save(LAYOUTS["transformers_with_its_trainer_state"](), path)
    assert "structure.tied" in {f["id"] for f in examined(path)["findings"]}
    torch.save(LAYOUTS["untrained"](), path)
    assert {f["id"] for f in examined(path)["findings"]} >= {"weights.at_init", "batchnorm.gamma_at_init"}
