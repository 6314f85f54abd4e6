"""Settings out of a run's config, under the names that projects give them. Pure."""

from __future__ import annotations

import re
from typing import Any, Optional

from remote_payload.checkpoint.header import CheckpointHeader

_NAMES = {
    "lr": ("learning_rate", "lr", "base_lr", "max_lr", "peak_lr", "lr0", "init_lr"),
    "start_lr": ("warmup_start_lr", "warmup_init_lr", "warmup_lr", "warmup_lr_init", "start_lr"),
    "min_lr": ("min_lr", "eta_min", "lr_min", "min_learning_rate", "final_lr", "end_lr", "lr_end"),
    "epochs": ("num_epochs", "max_epochs", "epochs", "n_epochs", "num_train_epochs", "total_epochs"),
    "steps": ("max_steps", "total_steps", "num_training_steps", "max_iters", "train_iters", "num_steps", "t_max"),
    "warmup_epochs": ("warmup_epochs", "num_warmup_epochs", "warmup_t"),
    "warmup_steps": ("warmup_steps", "num_warmup_steps", "warmup_iters", "warmup_updates"),
    "warmup_ratio": ("warmup_ratio", "warmup_fraction", "warmup_proportion", "pct_start"),
    "batch_size": (
        "batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_batch_size",
        "batch_size_per_gpu",
        "batch_size_per_device",
        "micro_batch_size",
    ),
    "accumulation": ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum", "accumulation_steps"),
    "gamma": ("lr_gamma", "gamma", "decay_rate", "lr_decay", "lr_decay_rate", "factor", "lr_factor"),
    "step_size": ("step_size", "lr_step_size", "decay_steps", "decay_epochs", "lr_step"),
    "power": ("power", "lr_power", "poly_power"),
    "div_factor": ("div_factor",),
    "final_div_factor": ("final_div_factor",),
    "ema_decay": ("ema_decay", "model_ema_decay", "ema_rate", "ema_beta", "ema_momentum", "averaging_decay"),
    "codebook_size": ("codebook_size", "audio_codebook_size", "num_codes", "n_codes", "codebook_entries"),
    "classes": ("num_classes", "n_classes", "num_labels", "nb_classes"),
    "volumes": ("num_val_samples", "val_samples", "n_val", "num_val", "val_size", "num_volumes", "n_volumes", "n_trs"),
    "voxels": ("num_voxels", "n_voxels", "voxels", "fmri_dim", "fmri_size"),
}
_MILESTONES = ("milestones", "lr_milestones", "lr_steps", "decay_milestones", "steps")
_SCHEDULER = (
    "scheduler_type",
    "lr_scheduler_type",
    "scheduler",
    "lr_scheduler",
    "lr_schedule",
    "schedule",
    "sched",
    "scheduler_name",
    "lr_policy",
    "lr_decay_style",
)
_DEPTH = 3
_LARGEST = 1e300


class RunConfig:
    """A config's settings by their last name, lower case; of equal names the outermost counts."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        level: list[dict[str, Any]] = [config]
        for _ in range(_DEPTH):
            deeper: list[dict[str, Any]] = []
            for section in level:
                for key, value in section.items():
                    self._values.setdefault(re.split(r"[./]", key)[-1].lower().replace("-", "_"), value)
                    if isinstance(value, dict):
                        deeper.append(value)
            level = deeper

    def number(self, what: str) -> Optional[float]:
        """A setting of the table above, None if it is not there or no finite number."""
        for name in _NAMES[what]:
            number = as_number(self._values.get(name))
            if number is not None:
                return number
        return None

    def scheduler(self) -> str:
        """The schedule's name in lower case without separators, empty if there is none."""
        for name in _SCHEDULER:
            value = self._values.get(name)
            if isinstance(value, dict):
                value = next((value[k] for k in ("name", "type", "_target_") if isinstance(value.get(k), str)), None)
            if isinstance(value, str):
                return re.sub(r"[^a-z0-9]", "", value.rpartition(".")[2].lower())
        return ""

    def milestones(self) -> tuple[float, ...]:
        for name in _MILESTONES:
            value = self._values.get(name)
            if isinstance(value, list) and value:
                numbers = [as_number(v) for v in value]
                if all(n is not None for n in numbers):
                    return tuple(sorted(n for n in numbers if n is not None))
        return ()

    def has_flag(self, *parts: str) -> bool:
        """Whether a setting whose name holds all the parts is switched on."""
        return any(value is True and all(p in name for p in parts) for name, value in self._values.items())

    def numbers_named(self, pattern: str) -> dict[str, float]:
        """Every number whose name matches a regular expression."""
        found = {n: as_number(v) for n, v in self._values.items() if re.search(pattern, n)}
        return {n: v for n, v in found.items() if v is not None}


def run_config(header: CheckpointHeader) -> RunConfig:
    return RunConfig(header.config)


def as_number(value: Any) -> Optional[float]:
    """A finite number, None for anything else; a bool is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # Compared as it is: an integer may be too large to become a float. NaN fails every comparison.
    return float(value) if -_LARGEST < value < _LARGEST else None
