"""Models of transformers, small and really trained, in the files that its users write."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any], Tensor]
Build = Callable[[], tuple[Any, Loss]]
WIDTH, LAYERS, HEADS, CHARACTERS = 32, 2, 4, 128
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
}


def sentences(samples: int = 8, length: int = 32) -> Tensor:
    """Spans of real text, a character a token: what a module of the standard library says."""
    text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace")))
    starts = torch.randint(0, len(text) - length, (samples,))
    return text[starts[:, None] + torch.arange(length)]


def gratings(samples: int = 8, size: int = 16, classes: int = 4) -> tuple[Tensor, Tensor]:
    """`(N, 3, size, size)` noisy stripes and their class: direction and width."""
    label = torch.randint(0, classes, (samples,))
    along = 0.8 * torch.arange(size) * (1 + label % 2)[:, None]
    stripes = torch.sin(along + 6.28 * torch.rand(samples, 1))[:, None, :].expand(-1, size, -1)
    image = torch.where((label < classes // 2)[:, None, None], stripes, stripes.transpose(1, 2))
    return (image[:, None] + 0.3 * torch.randn(samples, 3, size, size)).contiguous(), label


def bert() -> tuple[Any, Loss]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=CHARACTERS, max_position_embeddings=64, **ENCODER)

    def loss(model: Any) -> Tensor:
        words = sentences()
        hidden = torch.rand(words.shape) < 0.15
        labels = words.masked_fill(~hidden, -100)
        return model(input_ids=words.masked_fill(hidden, 0), labels=labels).loss

    return BertForMaskedLM(config), loss


def _language(model: Any) -> Tensor:
    words = sentences()
    return model(input_ids=words, labels=words).loss


def gpt2() -> tuple[Any, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=CHARACTERS, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    ), _language


def llama() -> tuple[Any, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=CHARACTERS, num_key_value_heads=2, **ENCODER)), _language


def t5() -> tuple[Any, Loss]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=CHARACTERS,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
    )

    def loss(model: Any) -> Tensor:
        words = sentences()
        given, wanted = words[:, :16].contiguous(), words[:, 16:].contiguous()
        return model(input_ids=given, labels=wanted).loss

    return T5ForConditionalGeneration(config), loss


def vit() -> tuple[Any, Loss]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=4, num_labels=4, **ENCODER)

    def loss(model: Any) -> Tensor:
        image, label = gratings()
        return model(pixel_values=image, labels=label).loss

    return ViTForImageClassification(config), loss


TRANSFORMERS: dict[str, Build] = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}


def trainer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that transformers' own Trainer makes: decay, and no decay for biases and normalisations."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The truth about an optimizer's numbers: the name of each parameter in the order of its groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def trained_files(name: str, folder: Path, mixed: bool, steps: int) -> Iterator[tuple[str, Path, list[str]]]:
    """Train by AdamW, warm-up and linear decay, float32 weights (under bfloat16 autocast if `mixed`), and write what
    people write: a checkpoint to resume from, safetensors, shards of them, and a cast for inference. With each its
    optimizer's names, if it holds one.
    """
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(0)
    model, loss_of = TRANSFORMERS[name]()
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, 2 * steps)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_of(model)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    if sum(losses[-5:]) >= sum(losses[:5]):
        raise AssertionError(f"{name} did not learn: {losses}")
    resumable = folder / "checkpoint.pt"
    states = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    torch.save({**{k: v.state_dict() for k, v in states.items()}, "global_step": steps}, resumable)
    yield "checkpoint", resumable, names_in(optimizer, model)
    model.save_pretrained(folder / "saved")
    yield "safetensors", folder / "saved", []
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    yield "shards", folder / "shards", []
    model.to(torch.bfloat16).save_pretrained(folder / "cast")
    yield "cast to bfloat16", folder / "cast", []
