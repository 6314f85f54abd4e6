"""Schedules replayed from config and counters, held against torch's own schedulers step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

from remote_payload.health import schedules
from tests.support.health_plants import examined, findings_of

PER_EPOCH, EPOCHS, PLANNED, PEAK = 20, 7, 15, 1e-2
Make = Callable[[torch.optim.Optimizer], Any]


def run(make: Make, per_epoch_step: bool, metric: Callable[[int], float] | None = None) -> tuple[float, dict[str, Any]]:
    """(last rate, scheduler's state) after EPOCHS epochs of PER_EPOCH steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=PEAK, momentum=0.9)
    schedule = make(optimizer)
    for epoch in range(EPOCHS):
        for _ in range(PER_EPOCH):
            optimizer.step()
            if not per_epoch_step:
                schedule.step()
        if per_epoch_step:
            schedule.step(metric(epoch)) if metric else schedule.step()
    return optimizer.param_groups[0]["lr"], schedule.state_dict()


def checkpoint(rate: float, config: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    steps = EPOCHS * PER_EPOCH
    found = {
        "epoch": EPOCHS,
        "global_step": steps,
        "state_dict": {"fc.weight": torch.randn(4, 4)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(4, 4)}},
            "param_groups": [{"lr": rate, "params": [0]}],
        },
        "config": config,
        "val_history": [{"loss": 2.0 - 0.1 * e} for e in range(EPOCHS)],
    }
    return {**found, **({"lr_scheduler": state} if state else {})}


def disagreements(tmp_path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    path = tmp_path / "checkpoint.pt"
    torch.save(document, path)
    return findings_of(examined(path), "training.schedule_disagrees")


def warm_cosine(o: torch.optim.Optimizer) -> Any:
    warmup = 2 * PER_EPOCH
    rising = lrs.LinearLR(o, start_factor=0.01, total_iters=warmup)
    falling = lrs.CosineAnnealingLR(o, T_max=PLANNED * PER_EPOCH - warmup, eta_min=1e-5)
    return lrs.SequentialLR(o, [rising, falling], milestones=[warmup])


def warm_linear(o: torch.optim.Optimizer) -> Any:
    total, warmup = PLANNED * PER_EPOCH, 30
    return lrs.LambdaLR(o, lambda s: s / warmup if s < warmup else max(0.0, (total - s) / (total - warmup)))


CASES: dict[str, tuple[Make, bool, dict[str, Any]]] = {
    "cosine": (
        lambda o: lrs.CosineAnnealingLR(o, T_max=PLANNED, eta_min=1e-5),
        True,
        {"lr": PEAK, "epochs": PLANNED, "scheduler": "cosine", "min_lr": 1e-5},
    ),
    "warm_cosine": (
        warm_cosine,
        False,
        {
            "learning_rate": PEAK,
            "num_epochs": PLANNED,
            "warmup_epochs": 2,
            "scheduler_type": "cosine",
            "min_lr": 1e-5,
        },
    ),
    "linear_of_transformers": (
        warm_linear,
        False,
        {
            "learning_rate": PEAK,
            "max_steps": PLANNED * PER_EPOCH,
            "warmup_steps": 30,
            "lr_scheduler_type": "linear",
        },
    ),
    "step": (
        lambda o: lrs.StepLR(o, step_size=3, gamma=0.3),
        True,
        {"lr": PEAK, "epochs": PLANNED, "lr_scheduler": "steplr", "lr_step_size": 3, "lr_gamma": 0.3},
    ),
    "multistep": (
        lambda o: lrs.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
        True,
        {"optim": {"lr": PEAK}, "sched": {"name": "MultiStepLR", "milestones": [2, 5], "gamma": 0.1}},
    ),
    "exponential": (
        lambda o: lrs.ExponentialLR(o, gamma=0.9),
        True,
        {"base_lr": PEAK, "lr_policy": "exponential", "gamma": 0.9},
    ),
    "one_cycle": (
        lambda o: lrs.OneCycleLR(o, max_lr=PEAK, total_steps=PLANNED * PER_EPOCH),
        False,
        {"max_lr": PEAK, "max_epochs": PLANNED, "scheduler": "OneCycleLR"},
    ),
    "polynomial": (
        lambda o: lrs.PolynomialLR(o, total_iters=PLANNED * PER_EPOCH, power=2.0),
        False,
        {"lr": PEAK, "total_steps": PLANNED * PER_EPOCH, "lr_schedule": "poly", "power": 2.0},
    ),
    "constant": (lambda o: lrs.LambdaLR(o, lambda _: 1.0), False, {"lr": PEAK, "scheduler": "constant"}),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_torchs_own_rate_agrees_and_another_does_not(tmp_path: Path, name: str) -> None:
    make, by_epoch, config = CASES[name]
    rate, _ = run(make, by_epoch)
    assert disagreements(tmp_path, checkpoint(rate, config)) == []
    wrong = disagreements(tmp_path, checkpoint(rate * 0.7, config))
    assert len(wrong) == 1
    assert wrong[0]["evidence"]["expected"] == pytest.approx(rate, rel=0.35)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"warm_cosine"}))
def test_the_schedulers_own_state_is_believed_only_if_it_fits(tmp_path: Path, name: str) -> None:
    make, by_epoch, _ = CASES[name]
    rate, state = run(make, by_epoch)
    config = {"note": "nothing about a schedule"}
    assert disagreements(tmp_path, checkpoint(rate, config, state)) == []
    assert disagreements(tmp_path, checkpoint(rate * 0.7, config, state)) != []
    lost = {**state, "last_epoch": 1000}
    assert disagreements(tmp_path, checkpoint(rate, config, lost)) != []


def test_a_plateau_schedule_leaves_a_power_of_its_factor(tmp_path: Path) -> None:
    config = {"lr": PEAK, "scheduler": "ReduceLROnPlateau", "factor": 0.5}
    rate, state = run(lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1), True, lambda _: 1.0)
    assert rate < PEAK
    assert disagreements(tmp_path, checkpoint(rate, config, state)) == []
    assert len(disagreements(tmp_path, checkpoint(0.8 * PEAK, config))) == 1


def test_accumulated_gradients_and_many_processes_are_counted_as_such(tmp_path: Path) -> None:
    rate, state = run(CASES["cosine"][0], True)
    document = checkpoint(rate, CASES["cosine"][2], {**state, "last_epoch": EPOCHS * PER_EPOCH * 8})
    document["lr_scheduler"].pop("T_max")
    assert disagreements(tmp_path, document) == []


def test_what_a_file_does_not_say_is_said_to_be_not_measured(tmp_path: Path) -> None:
    for config, missing in (
        ({"lr": PEAK}, "the config names no schedule"),
        ({"lr": PEAK, "scheduler": "cosine"}, "does not say how long"),
        ({"lr": PEAK, "scheduler": "step"}, "a step size and a factor"),
        ({"lr": PEAK, "scheduler": "plateau"}, "no factor for its plateau"),
        ({"lr": PEAK, "scheduler": "my_own"}, "none that can be replayed"),
    ):
        path = tmp_path / "checkpoint.pt"
        torch.save(checkpoint(PEAK, config), path)
        document = examined(path)
        assert missing in document["verdict"]["reasons"]["provenance"], missing
        assert findings_of(document, "training.schedule_disagrees") == []


def test_two_schedulers_taken_in_turn_end_lower_than_the_closed_form() -> None:
    """The lab's loop: the warm-up is stepped while the step is below its length, the cosine from then on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup, length, total = 470, 1880, 1363
    for step in range(warmup):
        optimizer.param_groups[0]["lr"] = 1e-5 + (1e-3 - 1e-5) * step / warmup
    for step in range(1, total - (warmup - 1) + 1):
        before = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = 1e-6 + (before - 1e-6) * (1 + math.cos(math.pi * step / length)) / (
            1 + math.cos(math.pi * (step - 1) / length)
        )
    chained = schedules.chained_cosine(1e-5, 1e-3, 1e-6, warmup, length)
    assert chained(total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert chained(total) == pytest.approx(5.377e-4, rel=1e-4)
    closed = schedules.warmed_up(1e-5, 1e-3, warmup, schedules.cosine(1e-3, 1e-6, length))
    assert closed(total) == pytest.approx(5.397e-4, rel=1e-4)


@pytest.mark.parametrize(
    "absurd", [1e308, -1e308, 5e-324, 0.0, -1.0, math.nan, math.inf, 10**400, True, "1e-3", [], {}]
)
def test_absurd_settings_stop_nothing(tmp_path: Path, absurd: Any) -> None:
    names = ("lr", "epochs", "warmup_epochs", "warmup_ratio", "min_lr", "gamma", "step_size", "power", "div_factor")
    names += ("num_classes", "codebook_size", "n_voxels", "n_volumes", "ema_decay", "batch_size", "final_div_factor")
    for kind in ("cosine", "linear", "poly", "step", "multistep", "exp", "onecycle", "plateau"):
        config = {**dict.fromkeys(names, absurd), "scheduler": kind, "milestones": [absurd, absurd]}
        document = checkpoint(
            PEAK, config, {"last_epoch": absurd, "base_lrs": [absurd], "T_max": absurd, "gamma": absurd}
        )
        document["val_history"] = [{"loss": absurd, "fmri_corr": 0.0, "audio_loss": absurd, "acc": 0.1}] * EPOCHS
        document["optimizer"]["state"][0]["step"] = absurd
        document["epoch"] = absurd
        path = tmp_path / "checkpoint.pt"
        torch.save(document, path)
        assert examined(path)["verdict"]["dimensions"]["integrity"] == "pass"


@pytest.mark.parametrize(
    ("steps", "labelled", "found"),
    [
        (51, True, True),
        (10 * EPOCHS, True, False),
        (EPOCHS * PER_EPOCH, True, False),
        (51, False, False),
    ],
    ids=["neither", "ten times an epoch", "every batch", "nothing to compare it with"],
)
def test_a_schedulers_count_is_held_against_batches_and_epochs(
    tmp_path: Path, steps: int, labelled: bool, found: bool
) -> None:
    document = checkpoint(PEAK, {}, {"gamma": 1.0, "base_lrs": [PEAK], "last_epoch": steps, "_last_lr": [PEAK]})
    if not labelled:
        del document["epoch"], document["val_history"]
    assert [f["title"].startswith(f"The scheduler took {steps} steps") for f in disagreements(tmp_path, document)] == (
        [True] if found else []
    )
