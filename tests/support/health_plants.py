"""Real training runs, small and deterministic, and the defects that are planted in their checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remote_payload.health.job import examine
from remote_payload.jobs.context import JobContext
from remote_payload.reference.model import FilmAutoencoder
from remote_payload.reference.sizes import ReferenceSizes
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, NodePlan, OverrunPolicy
from tests.support.checkpoints import LAB_CONFIG

Checkpoint = dict[str, Any]

LAB_STEPS, LAB_EPOCHS, LAB_STEPS_PER_EPOCH = 1363, 29, 47
LAB_LEARNING_RATE = 5.377e-4
LAB_FROZEN_SCALES = ("decoder.layer12_video.1.weight", "decoder.layer12_video.5.weight")
LAB_ZERO_SHIFTS = ("encoder.layer7_bottleneck.1.bias", "decoder.layer8.0.bias")
LAB_DOUBLE_COUNTERS = ("decoder.layer8.1", "decoder.layer9.1", "decoder.layer10.1", "decoder.layer11.1")
EPOCHS, STEPS_PER_EPOCH = 4, 6
_LAB_REAL_STEPS = 8


def examined(path: Path, against: Path | None = None) -> dict[str, Any]:
    """The health document of a file, after a round trip through strict JSON."""
    plan = NodePlan("test", "", (), str(path), EvaluationSettings(), GpuPolicy(device="cpu"), OverrunPolicy())
    context = JobContext(plan, "health", path.parent)
    document = examine(str(path), "cpu", context, None if against is None else str(against))
    return dict(json.loads(json.dumps(document, allow_nan=False)))


def findings_of(document: dict[str, Any], finding_id: str) -> list[dict[str, Any]]:
    return [f for f in document["findings"] if f["id"] == finding_id]


class SmallNet(nn.Module):
    """Linear, BatchNorm, LayerNorm and a head. `extra` is a layer that stands beside the path to the loss."""

    def __init__(self, bias: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(48, 64, bias=bias),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 96, bias=bias),
            nn.BatchNorm1d(96),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 10)
        self.extra = nn.Linear(48, 10) if extra else None
        self.extra_gain: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.body(x)))
        if self.extra is not None and self.extra_gain is not None:
            out = out + self.extra_gain * self.extra(x)
        return out


def small_run(
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-2,
    beta2: float = 0.95,
    make: Callable[[], nn.Module] = SmallNet,
    seed: int = 0,
) -> Checkpoint:
    """SmallNet after 24 real steps in 4 epochs, with its true labels, schedule and histories."""
    torch.manual_seed(seed)
    model = make().to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, beta2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 * STEPS_PER_EPOCH, eta_min=1e-6)
    teacher = torch.randn(48, 10)
    inputs = torch.randn(STEPS_PER_EPOCH + 1, 16, 48)
    train_history, val_history = [], []
    for _ in range(EPOCHS):
        model.train()
        for batch in inputs[:-1]:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(batch.to(dtype)).float(), batch @ teacher / 7)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        train_history.append({"loss": float(loss.detach())})
        model.eval()
        with torch.no_grad():
            held_out = nn.functional.mse_loss(model(inputs[-1].to(dtype)).float(), inputs[-1] @ teacher / 7)
        val_history.append({"loss": float(held_out), "correlation": 0.1 + 0.1 * len(val_history)})
    # The run is labelled as having just reached its best, whatever the noise of so short a run.
    val_history.sort(key=lambda entry: -float(entry["loss"]))
    best = float(val_history[-1]["loss"])
    return {
        "epoch": EPOCHS,
        "global_step": EPOCHS * STEPS_PER_EPOCH,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "best_val_loss": best,
        "val_loss": best,
        "config": {
            "learning_rate": lr,
            "batch_size": 16,
            "num_epochs": 10,
            "scheduler_type": "cosine",
            "min_lr": 1e-6,
        },
        "train_history": train_history,
        "val_history": val_history,
    }


def lab_run() -> Checkpoint:
    """The lab's figures at 1/16 scale: bf16 training for real, then the counters, labels and histories of its file.

    Two scales at 1 and the moments are what bf16 training leaves; the 20 other scales, which in the lab's run had left
    1 by its 1363rd step, are moved by hand.
    """
    torch.manual_seed(0)
    model = FilmAutoencoder(ReferenceSizes.at_scale(16)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(_LAB_REAL_STEPS):
        _film_step(model, optimizer, samples=2, raw=True)
    checkpoint = _film_checkpoint(model, optimizer)
    state = checkpoint["model_state_dict"]
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            twice = name.rpartition(".")[0] in LAB_DOUBLE_COUNTERS
            tensor.fill_(LAB_STEPS * (2 if twice else 1))
        elif _is_scale(state, name) and name not in LAB_FROZEN_SCALES:
            tensor.copy_(1 + 0.05 * torch.randn(tensor.shape))
    state["encoder.video_encoder.bn1.running_var"][0] = 7_274_496
    state["encoder.audio_encoder.bn1.running_var"][0] = 274_432
    order = [n for n, _ in model.named_parameters()]
    entries = checkpoint["optimizer_state_dict"]["state"]
    for name in LAB_ZERO_SHIFTS:
        state[name].zero_()
        for moment in ("exp_avg", "exp_avg_sq"):
            entries[order.index(name)][moment].zero_()
    for entry in entries.values():
        # As many more squared gradients of the same size.
        entry["exp_avg_sq"].mul_((1 - 0.999**LAB_STEPS) / (1 - 0.999**_LAB_REAL_STEPS))
        entry["step"].fill_(LAB_STEPS)
    checkpoint["optimizer_state_dict"]["param_groups"][0].update(lr=LAB_LEARNING_RATE, initial_lr=1e-3)
    losses = [300.0 - 14.76 * e for e in range(8)] + [167.15] + [170.0 + 5.5 * e for e in range(19)] + [274.71]
    checkpoint.update(
        epoch=50,
        global_step=LAB_STEPS,
        scheduler_state_dict={
            "T_max": 1880,
            "eta_min": 1e-6,
            "base_lrs": [1e-3],
            "last_epoch": 894,
            "_last_lr": [LAB_LEARNING_RATE],
        },
        best_val_loss=167.15,
        val_loss=167.15,
        config=dict(LAB_CONFIG),
        val_history=[{**_lab_parts(x), "fmri_correlation": 0.0013} for x in losses],
        train_history=[{**_lab_parts(900.0 - 6.87 * e), "learning_rate": 1e-3} for e in range(LAB_EPOCHS)],
    )
    return checkpoint


def _lab_parts(total: float) -> dict[str, float]:
    parts = {"audio_loss": 0.99 * total, "video_loss": 0.004 * total, "text_loss": 0.003 * total}
    return {"loss": total, **parts, "fmri_loss": 0.003 * total}


def twin_run() -> Checkpoint:
    """The same architecture trained in float32 on normalised data, 16 samples at a time, and labelled as it is."""
    torch.manual_seed(0)
    model = FilmAutoencoder(ReferenceSizes.at_scale(64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    epochs, per_epoch, warmup = 10, 6, 6
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * per_epoch - warmup, eta_min=1e-6)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[warmup])
    train_history: list[dict[str, float]] = []
    for _ in range(EPOCHS):
        for _ in range(per_epoch):
            loss = _film_step(model, optimizer, samples=16, raw=False)
            schedule.step()
        train_history.append({"loss": loss})
    history = sorted((entry["loss"] for entry in train_history), reverse=True)
    return {
        **_film_checkpoint(model, optimizer),
        "epoch": EPOCHS,
        "global_step": EPOCHS * per_epoch,
        "scheduler_state_dict": schedule.state_dict(),
        "best_val_loss": history[-1],
        "val_loss": history[-1],
        "config": {**LAB_CONFIG, "batch_size": 16, "num_epochs": epochs, "warmup_epochs": 1},
        "train_history": train_history,
        "val_history": [{"loss": x, "fmri_correlation": 0.05 + 0.02 * e} for e, x in enumerate(history)],
    }


def _film_step(model: FilmAutoencoder, optimizer: torch.optim.Optimizer, samples: int, raw: bool) -> float:
    """One step on random data: raw bytes and code numbers, or what a careful person would feed."""
    sizes, dtype = model.sizes, next(model.parameters()).dtype
    video = torch.rand(samples, sizes.video_in)
    codes = torch.randint(0, 1024, (samples, sizes.audio_in)).float()
    text, fmri = torch.randn(samples, sizes.text_in), torch.randn(samples, sizes.voxels)
    frame = video[:, : sizes.frame_elements]
    if raw:
        video = 255 * video
    else:
        codes = (codes - 511.5) / 295.6
    out = {k: v.float() for k, v in model(video.to(dtype), codes.to(dtype), text.to(dtype)).items()}
    pairs = (("video_recon", frame), ("audio_recon", codes), ("text_recon", text), ("predicted_fmri", fmri))
    loss = torch.stack([nn.functional.mse_loss(out[n], t) / t.std() for n, t in pairs]).sum()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _film_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    return {
        "model_state_dict": {n: t.detach().clone() for n, t in model.state_dict().items()},
        "optimizer_state_dict": copy.deepcopy(optimizer.state_dict()),
    }


def _is_scale(state: dict[str, Tensor], name: str) -> bool:
    return name.endswith(".weight") and state[name].dim() == 1
