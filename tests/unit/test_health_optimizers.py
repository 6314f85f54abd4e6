"""Checkpoints with several optimizers, or one under a name of its own: every moment counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remote_payload.checkpoint import read_header
from remote_payload.checkpoint.header import Role
from tests.support.health_plants import examined, findings_of


def gan(steps: int = 20) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """A generator's and a discriminator's weights after real steps, and the states of their optimizers."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"generator": nn.Linear(8, 16), "discriminator": nn.Linear(16, 4)})
    optimizers = [torch.optim.Adam(parts[n].parameters(), lr=1e-3) for n in ("generator", "discriminator")]
    for _ in range(steps):
        loss = (parts["discriminator"](parts["generator"](torch.randn(32, 8))) - 1).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    first, second = (o.state_dict() for o in optimizers)
    return parts.state_dict(), first, second


LAYOUTS: dict[str, Callable[[Any, Any, Any], dict[str, Any]]] = {
    "optimizer_g and optimizer_d": lambda w, g, d: {"state_dict": w, "optimizer_g": g, "optimizer_d": d},
    "G_optim and optim.D": lambda w, g, d: {"state_dict": w, "G_optim": g, "optim.D": d},
    "lightning": lambda w, g, d: {"state_dict": w, "optimizer_states": [g, d]},
    "a dict of two": lambda w, g, d: {"state_dict": w, "optimizers": {"g": g, "d": d}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_every_optimizer_are_known_as_such_and_cause_no_alarm(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "gan.pt"
    torch.save(LAYOUTS[layout](*gan()), path)
    header = read_header(str(path))
    roles = [t.role for t in header.tensors]
    assert roles.count(Role.SECOND_MOMENT) == roles.count(Role.FIRST_MOMENT) == 4
    assert any("2 optimizers" in note for note in header.notes)
    truth = [["generator.weight", "generator.bias"], ["discriminator.weight", "discriminator.bias"]]
    assert [list(o.parameters.values()) for o in header.optimizers] == truth
    document = examined(path)
    assert document["joint"].keys() == {name for names in truth for name in names}
    assert [f["id"] for f in document["findings"] if f["severity"] != "info"] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_negative_second_moment_is_found_in_the_second_optimizer(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "gan.pt"
    weights, first, second = gan()
    second["state"][0]["exp_avg_sq"][1, 2] = -1.0
    torch.save(LAYOUTS[layout](weights, first, second), path)
    assert "optimizer.negative_second_moment" in [f["id"] for f in examined(path)["findings"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_cut_off_from_the_second_optimizers_loss_is_found_by_name(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "gan.pt"
    weights, first, second = gan()
    second["state"][0]["exp_avg_sq"].zero_()
    torch.save(LAYOUTS[layout](weights, first, second), path)
    assert [f["where"] for f in findings_of(examined(path), "optimizer.zero_gradient")] == [["discriminator.weight"]]


def test_optimizers_of_twins_are_matched_to_nothing_and_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "twins.pt"
    torch.manual_seed(0)
    twins = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
    optimizers = [torch.optim.Adam(twins[n].parameters(), lr=1e-3) for n in ("first", "second")]
    (twins["second"](twins["first"](torch.randn(4, 8))) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.save({"state_dict": twins.state_dict(), "optimizer_states": [o.state_dict() for o in optimizers]}, path)
    header = read_header(str(path))
    assert [o.mapping for o in header.optimizers] == ["not_derivable", "not_derivable"]
    assert sum("cannot be derived" in note for note in header.notes) == 2
    assert [f["id"] for f in examined(path)["findings"] if f["severity"] != "info"] == []


def test_one_optimizer_under_a_name_of_its_own_is_described(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "my_optimizer": optimizer.state_dict()}, path)
    facts = read_header(str(path)).optimizer
    assert facts is not None
    assert (facts.path, facts.mapping) == ("my_optimizer", "by_order")
