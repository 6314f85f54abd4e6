"""A parameter and its Adam moments read together, against torch's own optimizer arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.health.facts import ScanResult
from remote_payload.health.scan import scan
from remote_payload.health.stats import QUANTILES, JointStats

NAME = "layer.weight"


def checkpoint(w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: float = 100.0, **group: Any) -> dict[str, Any]:
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0], **group}]
    state = {0: {"step": torch.tensor(step), "exp_avg": m, "exp_avg_sq": v}}
    return {"model_state_dict": {NAME: w}, "optimizer_state_dict": {"state": state, "param_groups": groups}}


def examine(tmp_path: Path, document: Any, block_bytes: int | None = None) -> ScanResult:
    path = tmp_path / "c.pt"
    torch.save(document, path)
    return scan(read_header(str(path)), "cpu", lambda _done, _total: None, block_bytes)


def joint(tmp_path: Path, document: Any, block_bytes: int | None = None) -> JointStats:
    return examine(tmp_path, document, block_bytes).joint[NAME]


def random_trio(dtype: torch.dtype, shape: tuple[int, int] = (150, 211)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    w, m, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return (0.5 * w).to(dtype), (1e-3 * m).to(dtype), (1e-5 * v.abs()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_bytes", [None, 96, 4800])
def test_a_step_counts_as_rounded_away_exactly_where_the_weight_would_stand_still(
    tmp_path: Path, dtype: torch.dtype, block_bytes: int | None
) -> None:
    w, m, v = random_trio(dtype)
    found = joint(tmp_path, checkpoint(w, m, v), block_bytes)
    update = 1e-3 * (m.double() / (1 - 0.9**100)) / ((v.double() / (1 - 0.999**100)).sqrt() + 1e-8)
    expected = float(((w.double() - update).to(dtype) == w)[update != 0].double().mean())
    assert found.step_rounded_fraction == pytest.approx(expected, abs=1e-4)
    assert found.steps_measured == int((update != 0).sum())


def test_a_bf16_scale_at_one_stays_where_an_fp32_one_moves(tmp_path: Path) -> None:
    ones, m, v = torch.ones(64, 64), torch.full((64, 64), 1e-3), torch.full((64, 64), 1e-6)
    stuck = joint(tmp_path, checkpoint(ones.bfloat16(), m.bfloat16(), v.bfloat16(), step=1e6))
    assert (stuck.ones_with_step, stuck.ones_rounded_fraction) == (4096, 1.0)
    moving = joint(tmp_path, checkpoint(ones, m, v, step=1e6))
    assert (moving.ones_with_step, moving.ones_rounded_fraction) == (4096, 0.0)


def test_the_peak_rate_is_judged_apart_from_the_stored_one(tmp_path: Path) -> None:
    w, m, v = torch.full((32, 32), 0.5), torch.full((32, 32), 1e-3), torch.full((32, 32), 1e-6)
    trio = (t.bfloat16() for t in (w, m, v))
    found = joint(tmp_path, checkpoint(*trio, step=1e6, lr=1e-5, initial_lr=1e-2))
    assert found.settings.peak_learning_rate == 1e-2
    assert (found.step_rounded_fraction, found.step_rounded_fraction_at_peak) == (1.0, 0.0)


def test_a_bf16_second_moment_cannot_decay_at_0_999_and_an_fp32_one_can(tmp_path: Path) -> None:
    w, m, v = random_trio(torch.bfloat16)
    assert joint(tmp_path, checkpoint(w, m, v)).v_decay_stalled_fraction == 1.0
    assert joint(tmp_path, checkpoint(w, m, v.float())).v_decay_stalled_fraction == 0.0
    assert joint(tmp_path, checkpoint(w, m, v, betas=(0.9, 0.9))).v_decay_stalled_fraction == 0.0


def test_what_the_second_moment_alone_says(tmp_path: Path) -> None:
    w, m, v = random_trio(torch.float32, (100, 100))
    v[0], v[1, 0], v[2, 0] = 0.0, -1.0, float("nan")
    found = joint(tmp_path, checkpoint(w, m, v))
    assert (found.v_zero_fraction, found.v_negative, found.v_nan) == (0.01, 1, 1)
    assert found.zeros_with_gradient == 0
    assert found.root_v_quantiles is not None
    assert len(found.root_v_quantiles) == len(QUANTILES)
    roots = (v[v >= 0].double() / (1 - 0.999**100)).sqrt()
    assert found.root_v_quantiles[4] == pytest.approx(float(roots.median()), rel=0.01)
    assert not found.v_all_zero


def test_a_weight_at_zero_with_a_gradient_is_counted(tmp_path: Path) -> None:
    w, m, v = random_trio(torch.bfloat16, (10, 10))
    w[0], v[0, :4] = 0.0, 0.0
    found = joint(tmp_path, checkpoint(w, m, v))
    assert (found.w_zero_fraction, found.zeros_with_gradient) == (0.1, 6)


def test_eps_larger_than_every_root_is_seen(tmp_path: Path) -> None:
    w, m, v = random_trio(torch.float32, (40, 40))
    found = joint(tmp_path, checkpoint(w, m, v * 1e-20))
    assert found.v_below_eps_fraction == 1.0
    assert found.eps_ratio_quantiles is not None
    assert found.eps_ratio_quantiles[-1] < 1


def test_moments_of_another_type_than_the_weights_are_read_with_them(tmp_path: Path) -> None:
    w, m, v = random_trio(torch.bfloat16)
    mixed = joint(tmp_path, checkpoint(w, m.float(), v.float()), 1000)
    same = joint(tmp_path, checkpoint(w, m, v))
    assert (mixed.steps_measured, mixed.step_rounded_fraction) == (same.steps_measured, same.step_rounded_fraction)


def test_every_group_has_its_own_learning_rate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[1].parameters(), "lr": 1e-4}]
    )
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    document = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    found = examine(tmp_path, document).joint
    assert {n: j.settings.learning_rate for n, j in found.items()} == {
        "0.weight": 1e-2,
        "0.bias": 1e-2,
        "1.weight": 1e-4,
        "1.bias": 1e-4,
    }
    assert {j.settings.step for j in found.values()} == {3.0}


def test_a_flipped_bit_in_a_record_that_is_read_with_others_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(checkpoint(*random_trio(torch.bfloat16)), path)
    header = read_header(str(path))
    moment = next(t for t in header.tensors if t.name.endswith("exp_avg_sq"))
    assert moment.file_offset is not None
    data = bytearray(path.read_bytes())
    data[moment.file_offset + 1001] ^= 4
    path.write_bytes(data)
    checksums = scan(read_header(str(path)), "cpu", lambda _done, _total: None, 4800).checksums
    assert [m.record for m in checksums.mismatches] == [
        r.name for r in header.records if r.offset == moment.file_offset
    ]


def test_without_settings_the_reason_is_given(tmp_path: Path) -> None:
    document = checkpoint(*random_trio(torch.float32))
    del document["optimizer_state_dict"]["param_groups"][0]["betas"]
    result = examine(tmp_path, document)
    assert not result.joint
    assert "betas" in result.joint_not_measured[NAME]
    assert NAME in result.stats
