"""Trains the small checkpoint of the demonstration, and writes it in the form of the laboratory's file.

Unlike the laboratory's run it keeps fp32 weights, takes batches large enough for BatchNorm, and saves the weights that
its labels speak of: the epoch with the lowest validation loss, with the counters, moments, schedule and histories of
that very epoch. Training never looks at the test parts of the films.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from remote_payload.reference.data import DemonstrationData
from remote_payload.reference.model import FilmAutoencoder
from remote_payload.reference.windows import Batch, Windows

_LOSS_WEIGHTS = {"video": 20.0, "fmri": 0.1, "text": 0.2, "audio": 0.5}
_FIRST_LEARNING_RATE = 1e-5
_PLAIN_SHARE = 0.5
_GAIN, _OFFSET = 0.15, 0.075


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What is trained and how; becomes the checkpoint's `config`."""

    scale: int
    num_epochs: int = 60
    warmup_epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.01
    gradient_clip_val: float = 1.0
    dropout: float = 0.1
    seed: int = 0

    def config(self, data_digest: str) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "model": "film_autoencoder",
            "scheduler_type": "cosine",
            "optimizer": "adamw",
            "dtype": "float32",
            "devices": 1,
            "data_digest": data_digest,
            "loss_weights": dict(_LOSS_WEIGHTS),
        }


def train(data: DemonstrationData, plan: TrainingPlan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The checkpoint of the best epoch. The same data, plan and machine give the same weights, however busy it is."""
    training, validation = Windows(data, "train"), Windows(data, "val")
    steps_per_epoch = len(training) // plan.batch_size
    run = _Run(data, plan, steps_per_epoch)
    best: dict[str, Any] = {}
    for epoch in range(1, plan.num_epochs + 1):
        run.train_epoch(training)
        losses = run.validate(validation)
        if not best or losses["loss"] < best["val_loss"]:
            best = run.snapshot(epoch)
        if epoch % 10 == 0 or epoch == plan.num_epochs:
            say(f"epoch {epoch}/{plan.num_epochs}: validation loss {losses['loss']:.4f}, video {losses['video']:.4f}")
    say(f"kept epoch {best['epoch']} with validation loss {best['val_loss']:.4f}")
    return best


def untrained(data: DemonstrationData, plan: TrainingPlan) -> dict[str, Any]:
    """The checkpoint `epoch00`: as initialised, no step taken, empty histories."""
    run = _Run(data, plan, steps_per_epoch=len(Windows(data, "train")) // plan.batch_size)
    run.validate(Windows(data, "val"))
    run.train_history, val_history, run.val_history = [], run.val_history, []
    return {**run.snapshot(0), "val_loss": val_history[-1]["loss"], "best_val_loss": val_history[-1]["loss"]}


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write it beside `path` first: nothing partial ever stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


class _Run:
    def __init__(self, data: DemonstrationData, plan: TrainingPlan, steps_per_epoch: int) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.steps_per_epoch = steps_per_epoch
        self.config = plan.config(str(data.manifest["digest"]))
        self.model = FilmAutoencoder(data.sizes, plan.dropout)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
        )
        warmup = plan.warmup_epochs * steps_per_epoch
        rest = max(1, plan.num_epochs * steps_per_epoch - warmup)
        rising = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=_FIRST_LEARNING_RATE / plan.learning_rate, total_iters=warmup
        )
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=rest, eta_min=plan.min_lr)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [rising, falling], milestones=[warmup])
        self.global_step = 0
        self.train_history: list[dict[str, float]] = []
        self.val_history: list[dict[str, float]] = []

    def train_epoch(self, training: Windows) -> None:
        self.model.train()
        order = torch.randperm(len(training))
        totals: dict[str, float] = {}
        for step in range(self.steps_per_epoch):
            batch = training[order[step * self.plan.batch_size : (step + 1) * self.plan.batch_size]]
            for name, value in self.step(batch).items():
                totals[name] = totals.get(name, 0.0) + value / self.steps_per_epoch
        self.train_history.append({**totals, "learning_rate": float(self.optimizer.param_groups[0]["lr"])})

    def step(self, batch: Batch) -> dict[str, float]:
        plain = torch.rand(len(batch.video)) < _PLAIN_SHARE
        losses = _losses(self.model, _augmented(batch, plain), plain)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses["loss"])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.gradient_clip_val)
        self.optimizer.step()
        self.scheduler.step()
        self.global_step += 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def validate(self, validation: Windows) -> dict[str, float]:
        self.model.eval()
        batch = validation.all()
        with torch.no_grad():
            losses = _losses(self.model, batch, torch.ones(len(validation), dtype=torch.bool))
            predicted = self.model(batch.video.flatten(1), batch.codes, batch.text)["predicted_fmri"]
        found = {name: float(value) for name, value in losses.items()}
        found["fmri_correlation"] = _mean_voxelwise_correlation(predicted, batch.fmri)
        found["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        self.val_history.append(found)
        return found

    def snapshot(self, epoch: int) -> dict[str, Any]:
        losses = [entry["loss"] for entry in self.val_history]
        return {
            "epoch": epoch,
            "global_step": self.global_step,
            "model_state_dict": {name: t.detach().clone() for name, t in self.model.state_dict().items()},
            "optimizer_state_dict": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler_state_dict": copy.deepcopy(self.scheduler.state_dict()),
            "best_val_loss": min(losses, default=float("inf")),
            "val_loss": losses[-1] if losses else float("inf"),
            "config": dict(self.config),
            "train_history": [dict(entry) for entry in self.train_history],
            "val_history": [dict(entry) for entry in self.val_history],
        }


def _losses(model: nn.Module, batch: Batch, plain: Tensor) -> dict[str, Tensor]:
    """Mean squared errors. Voxels count only for `plain` samples: BOLD does not follow a frame that we have changed."""
    out = model(batch.video.flatten(1), batch.codes, batch.text)
    parts = {
        "video": nn.functional.mse_loss(out["video_recon"], batch.target_frame),
        "fmri": _masked_error(out["predicted_fmri"], batch.fmri, plain),
        "text": nn.functional.mse_loss(out["text_recon"], batch.text),
        "audio": _masked_error(out["audio_recon"], batch.codes, batch.has_sound),
    }
    total = torch.stack([_LOSS_WEIGHTS[name] * value for name, value in parts.items()]).sum()
    return {"loss": total, **parts}


def _masked_error(given: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    squared = ((given - wanted) ** 2).mean(dim=1)
    return (squared * rows).sum() / rows.sum().clamp(min=1)


def _augmented(batch: Batch, plain: Tensor) -> Batch:
    """Another brightness and contrast, and every other window mirrored; `plain` samples stay as they are."""
    count = len(batch.video)
    gain = 1.0 + _GAIN * (2.0 * torch.rand(count, 1, 1, 1, 1) - 1.0)
    offset = _OFFSET * (2.0 * torch.rand(count, 1, 1, 1, 1) - 1.0)
    changed = (batch.video * gain + offset).clamp(0.0, 1.0)
    mirrored = (torch.rand(count) < 0.5)[:, None, None, None, None]
    changed = torch.where(mirrored, changed.flip(3), changed)
    return dataclasses.replace(batch, video=torch.where(plain[:, None, None, None, None], batch.video, changed))


def _mean_voxelwise_correlation(given: Tensor, wanted: Tensor) -> float:
    centred_given, centred_wanted = (t.double() - t.double().mean(dim=0) for t in (given, wanted))
    norms = centred_given.norm(dim=0) * centred_wanted.norm(dim=0)
    products = (centred_given * centred_wanted).sum(dim=0)
    return float(torch.where(norms > 0, products / norms.clamp(min=1e-12), torch.zeros_like(norms)).mean())
