"""Every finding of a checkpoint's values, training and task: planted in a file of a real run, and silent without."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remote_payload.health.__main__ import main
from tests.support.checkpoints import CodeOnLoad, tensor_pickle, torch_zip_of
from tests.support.health_plants import EPOCHS, Checkpoint, SmallNet, examined, findings_of, small_run

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
Plant = Callable[[Checkpoint], Checkpoint | None]


@functools.lru_cache(maxsize=4)
def base_run(dtype: torch.dtype) -> Checkpoint:
    return small_run(dtype)


def document_of(tmp_path: Path, checkpoint: Any, name: str = "checkpoint.pt") -> dict[str, Any]:
    path = tmp_path / name
    torch.save(checkpoint, path)
    return examined(path)


def weight(c: Checkpoint, name: str = "body.0.weight") -> torch.Tensor:
    tensor: torch.Tensor = c["model_state_dict"][name]
    return tensor


def entries(c: Checkpoint) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = c["optimizer_state_dict"]["state"]
    return found


def nan(c: Checkpoint) -> None:
    weight(c)[2, 3] = math.nan


def inf(c: Checkpoint) -> None:
    weight(c)[2, 3] = math.inf


def beyond_fp16(c: Checkpoint) -> None:
    weight(c)[2, 3] = 1e6


def subnormal(c: Checkpoint) -> None:
    weight(c)[:8] = 2e-39


def one_value(c: Checkpoint) -> None:
    weight(c).fill_(0.25)


def zero_rows(c: Checkpoint) -> None:
    weight(c)[:8] = 0


def copied_rows(c: Checkpoint) -> None:
    weight(c)[:8] = weight(c)[8:16]


def drawn_anew(c: Checkpoint) -> None:
    torch.manual_seed(1)
    weight(c).copy_(nn.Linear(48, 64).weight.detach())


def scales_at_one(c: Checkpoint) -> None:
    weight(c, "body.1.weight").fill_(1)


def negative_variance(c: Checkpoint) -> None:
    weight(c, "body.1.running_var")[0] = -1


def huge_variance(c: Checkpoint) -> None:
    weight(c, "body.1.running_var")[0] = 7_274_496


def counted_twice(c: Checkpoint) -> None:
    weight(c, "body.4.num_batches_tracked").mul_(2)


def two_samples(c: Checkpoint) -> None:
    c["config"]["batch_size"] = 2


def with_biases(c: Checkpoint) -> Checkpoint:
    return small_run(weight(c).dtype, make=lambda: SmallNet(bias=True))


def merged_models(c: Checkpoint) -> None:
    c["model_state_dict"]["head.bias"] = torch.zeros(7, dtype=weight(c).dtype)


def two_names(c: Checkpoint) -> None:
    c["model_state_dict"]["tied.weight"] = weight(c, "head.weight")


def small_steps_in_bfloat16(_: Checkpoint) -> Checkpoint:
    return small_run(BFLOAT16, lr=1e-4)


def slow_decay_in_bfloat16(_: Checkpoint) -> Checkpoint:
    return small_run(BFLOAT16, beta2=0.999)


def averaged(c: Checkpoint, dtype: torch.dtype, decay: float) -> None:
    c["ema_state_dict"] = {n: t.to(dtype) for n, t in c["model_state_dict"].items() if t.is_floating_point()}
    c["config"]["ema_decay"] = decay


def average_in_bfloat16(c: Checkpoint) -> None:
    averaged(c, BFLOAT16, 0.9999)


def unused_layer(c: Checkpoint) -> Checkpoint:
    return small_run(weight(c).dtype, make=lambda: SmallNet(extra=True))


def with_gain(gain: float) -> nn.Module:
    model = SmallNet(extra=True)
    model.extra_gain = gain
    return model


def cut_off_layer(c: Checkpoint) -> Checkpoint:
    return small_run(weight(c).dtype, make=lambda: with_gain(0.0))


def faint_layer(c: Checkpoint) -> Checkpoint:
    return small_run(weight(c).dtype, make=lambda: with_gain(1e-9))


def swapped_moments(c: Checkpoint) -> None:
    state = entries(c)
    state[0], state[3] = state[3], state[0]


def negative_moment(c: Checkpoint) -> None:
    entries(c)[0]["exp_avg_sq"][0, 0] = -1e-6


def wrong_epoch(c: Checkpoint) -> None:
    c["epoch"] = 9


def other_rate(c: Checkpoint) -> None:
    c["optimizer_state_dict"]["param_groups"][0]["lr"] *= 0.3


def scheduler_of_another_moment(c: Checkpoint) -> None:
    c["scheduler_state_dict"]["last_epoch"] = 17


def last_as_best(c: Checkpoint) -> None:
    c["val_history"] = [{"loss": x} for x in (3.0, 1.0, 2.0, 2.5)]
    c["best_val_loss"] = c["val_loss"] = 1.0


def best_above_its_history(c: Checkpoint) -> None:
    c["best_val_loss"] = 2 * c["val_history"][0]["loss"]


def parts(c: Checkpoint, audio: float, video: float) -> None:
    for history in ("train_history", "val_history"):
        for entry in c[history]:
            total = entry["loss"]
            entry["audio_loss"], entry["video_loss"] = audio * total, video * total


def one_part_drowns_the_other(c: Checkpoint) -> None:
    parts(c, 0.99, 0.01)


def chance(c: Checkpoint) -> None:
    for epoch, entry in enumerate(c["val_history"]):
        entry["correlation"] = 0.0013 * (-1) ** epoch


def constant_codes(c: Checkpoint) -> None:
    c["config"]["codebook_size"] = 1024
    for entry in c["val_history"]:
        entry["audio_loss"] = 274.0


PLANTED: list[tuple[Plant, str, str, str]] = [
    (nan, "values.nan", "error", "body.0.weight"),
    (inf, "values.inf", "error", "body.0.weight"),
    (beyond_fp16, "values.fp16_overflow", "info", "body.0.weight"),
    (subnormal, "values.denormal", "info", "body.0.weight"),
    (one_value, "weights.constant", "warning", "body.0.weight"),
    (zero_rows, "weights.dead_rows", "warning", "body.0.weight"),
    (copied_rows, "weights.duplicate_rows", "warning", "body.0.weight"),
    (drawn_anew, "weights.at_init", "info", "body.0.weight"),
    (scales_at_one, "batchnorm.gamma_at_init", "warning", "body.1.weight"),
    (negative_variance, "batchnorm.running_var_nonpositive", "error", "body.1.running_var"),
    (huge_variance, "batchnorm.running_var_large", "warning", "body.1.running_var"),
    (counted_twice, "batchnorm.counter_mismatch", "warning", "body.4.num_batches_tracked"),
    (two_samples, "batchnorm.samples_per_rank", "error", "config"),
    (with_biases, "structure.bias_before_norm", "info", "body.0.bias"),
    (merged_models, "structure.shape_mismatch", "error", "head.bias"),
    (two_names, "structure.tied", "info", "head.weight = tied.weight"),
    (average_in_bfloat16, "precision.ema_stalled", "error", "ema_state_dict/body.0.weight"),
    (unused_layer, "optimizer.missing_state", "info", "extra.weight"),
    (cut_off_layer, "optimizer.zero_gradient", "warning", "extra.weight"),
    (faint_layer, "optimizer.eps_floored", "warning", "extra.weight"),
    (swapped_moments, "optimizer.misaligned", "warning", "body.0.weight"),
    (negative_moment, "optimizer.negative_second_moment", "error", "body.0.weight"),
    (wrong_epoch, "training.epoch_disagrees", "error", "epoch"),
    (other_rate, "training.schedule_disagrees", "warning", "optimizer"),
    (scheduler_of_another_moment, "training.schedule_disagrees", "warning", "scheduler"),
    (last_as_best, "training.best_is_last", "error", "val_history.loss"),
    (best_above_its_history, "training.history_contradiction", "warning", "val_history.loss"),
    (one_part_drowns_the_other, "training.loss_dominated", "warning", "val_history.audio_loss"),
    (chance, "task.chance_level", "error", "val_history.correlation"),
    (constant_codes, "task.constant_predictor", "error", "val_history.audio_loss"),
]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("plant", "finding", "severity", "where"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_a_planted_defect_is_found_where_it_is(
    tmp_path: Path, plant: Plant, finding: str, severity: str, where: str, dtype: torch.dtype
) -> None:
    checkpoint = copy.deepcopy(base_run(dtype))
    checkpoint = plant(checkpoint) or checkpoint
    found = findings_of(document_of(tmp_path, checkpoint), finding)
    assert {f["severity"] for f in found if where in f["where"]} == {severity}
    for part in ("evidence", "explanation", "refuted_by", "action", "title"):
        assert found[0][part], part
    assert 0 < found[0]["confidence"] <= 1


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_the_run_without_a_defect_is_silent(tmp_path: Path, dtype: torch.dtype) -> None:
    document = document_of(tmp_path, base_run(dtype))
    assert document["findings"] == []
    assert document["verdict"]["dimensions"]["training_dynamics"] == "pass"


@pytest.mark.parametrize(
    ("plant", "finding"),
    [
        (small_steps_in_bfloat16, "precision.update_below_ulp"),
        (slow_decay_in_bfloat16, "precision.second_moment_stalled"),
    ],
)
def test_training_in_bfloat16_alone_is_found_in_the_numbers(tmp_path: Path, plant: Plant, finding: str) -> None:
    found = findings_of(document_of(tmp_path, plant({})), finding)
    assert [f["severity"] for f in found] == ["error"]


def test_small_steps_and_slow_decay_are_no_finding_in_float32(tmp_path: Path) -> None:
    document = document_of(tmp_path, small_run(FLOAT32, lr=1e-4, beta2=0.999))
    assert [f["id"] for f in document["findings"] if f["id"].startswith("precision.")] == []


def test_a_file_widened_to_float32_after_bfloat16_training_is_seen_through(tmp_path: Path) -> None:
    checkpoint = small_run(BFLOAT16, lr=1e-4, make=lambda: WideNet())
    state = checkpoint["model_state_dict"]
    for name, tensor in state.items():
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    found = findings_of(document_of(tmp_path, checkpoint), "precision.update_below_ulp")
    assert [f["evidence"]["stored_as_float32"] for f in found] == [True]


class WideNet(SmallNet):
    """Enough layers for their extremes to tell a type."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(8):
            layers.extend((nn.Linear(96, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU()))
        self.body = nn.Sequential(*self.body, *layers)


@pytest.mark.parametrize(
    "innocent",
    [
        lambda c: averaged(c, FLOAT32, 0.9999),
        lambda c: averaged(c, BFLOAT16, 0.9),
        lambda c: parts(c, 0.6, 0.4),
        lambda c: c["config"].update(codebook_size=1024) or parts(c, 0.6, 0.4),
        lambda c: c.update(epoch=3),
        lambda c: c.pop("config"),
        lambda c: c.pop("optimizer_state_dict"),
        lambda c: stepped_by_epoch(c),
    ],
    ids=["ema_float32", "ema_fast", "parts", "codes", "epoch_from_0", "no_config", "no_optimizer", "by_epoch"],
)
def test_what_has_an_innocent_explanation_is_silent(tmp_path: Path, innocent: Callable[[Checkpoint], Any]) -> None:
    checkpoint = copy.deepcopy(base_run(FLOAT32))
    innocent(checkpoint)
    assert [f["id"] for f in document_of(tmp_path, checkpoint)["findings"] if f["severity"] != "info"] == []


def stepped_by_epoch(c: Checkpoint) -> None:
    rate = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * EPOCHS / 10)) / 2
    c["scheduler_state_dict"].update(last_epoch=EPOCHS, T_max=10, _last_lr=[rate])
    c["optimizer_state_dict"]["param_groups"][0]["lr"] = rate


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter whose second factor may be forgotten."""

    def __init__(self, train_b: bool) -> None:
        super().__init__()
        self.base = nn.Linear(48, 10).requires_grad_(False)
        self.lora_A = nn.Linear(48, 4, bias=False)
        self.lora_B = nn.Linear(4, 10, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_B.requires_grad_(train_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return out


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_an_adapter_whose_b_was_never_trained_is_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    forgotten = document_of(tmp_path, small_run(dtype, make=lambda: Adapted(train_b=False)))
    assert [f["where"] for f in findings_of(forgotten, "lora.b_zero")] == [["lora_B.weight"]]
    assert findings_of(forgotten, "lora.b_zero")[0]["severity"] == "error"
    trained = document_of(tmp_path, small_run(dtype, make=lambda: Adapted(train_b=True)))
    assert findings_of(trained, "lora.b_zero") == []


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_what_did_not_move_since_an_earlier_checkpoint_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    earlier, later = tmp_path / "earlier.pt", tmp_path / "later.pt"
    torch.save(small_run(dtype), earlier)
    checkpoint = small_run(dtype, seed=1)
    checkpoint["model_state_dict"]["head.weight"] = base_run(dtype)["model_state_dict"]["head.weight"].clone()
    for name, tensor in checkpoint["model_state_dict"].items():
        if name.endswith("num_batches_tracked"):
            tensor.mul_(2)
    torch.save(checkpoint, later)
    document = examined(later, earlier)
    found = findings_of(document, "drift.unchanged")
    assert [f["where"] for f in found] == [["head.weight"]]
    assert found[0]["severity"] == "warning"
    numbers = document["drift"]["tensors"]
    assert numbers["head.weight"]["identical_fraction"] == 1.0
    assert numbers["head.weight"]["relative_change"] == 0.0
    assert numbers["head.weight"]["cosine"] == pytest.approx(1.0)
    before = torch.load(earlier)["model_state_dict"]["body.0.weight"].double()
    after = checkpoint["model_state_dict"]["body.0.weight"].double()
    cosine = float((before * after).sum() / before.norm() / after.norm())
    assert numbers["body.0.weight"]["cosine"] == pytest.approx(cosine)
    assert numbers["body.0.weight"]["relative_change"] == pytest.approx(float((after - before).norm() / before.norm()))


def test_two_runs_that_both_moved_have_no_drift_finding(tmp_path: Path) -> None:
    earlier, later = tmp_path / "earlier.pt", tmp_path / "later.pt"
    torch.save(small_run(), earlier)
    torch.save(small_run(seed=1), later)
    assert findings_of(examined(later, earlier), "drift.unchanged") == []
    assert examined(later)["drift"] is None


def test_the_same_save_twice_is_an_unchanged_model(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(base_run(FLOAT32), path)
    found = findings_of(examined(path, path), "drift.unchanged")
    assert found[0]["evidence"]["share_of_elements"] == 1.0


def test_a_flipped_bit_a_cut_and_a_forged_size_are_three_findings(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(base_run(FLOAT32), whole)
    assert [f["id"] for f in examined(whole)["findings"] if f["id"].startswith("integrity.")] == []
    data = bytearray(whole.read_bytes())
    at = bytes(data).find(weight(base_run(FLOAT32)).numpy().tobytes())
    data[at + 100] ^= 1
    flipped, cut, forged = tmp_path / "flipped.pt", tmp_path / "cut.pt", tmp_path / "forged.pt"
    flipped.write_bytes(data)
    cut.write_bytes(whole.read_bytes()[: len(data) // 2])
    forged.write_bytes(torch_zip_of(tensor_pickle(numel=4, shape=(4,)), {"0": bytes(8)}))
    for path, finding in (
        (flipped, "integrity.crc_mismatch"),
        (cut, "integrity.truncated"),
        (forged, "integrity.record_size"),
    ):
        found = findings_of(examined(path), finding)
        assert [f["severity"] for f in found] == ["error"], finding


def test_code_in_a_pickle_is_named_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    document = document_of(tmp_path, {**base_run(FLOAT32), "extra": CodeOnLoad(marker)})
    assert [f["severity"] for f in findings_of(document, "security.unsafe_global")] == ["error"]
    assert not marker.exists()


def test_chance_is_judged_with_the_standard_error_of_smooth_signals(tmp_path: Path) -> None:
    checkpoint = copy.deepcopy(base_run(FLOAT32))
    checkpoint["config"].update(n_voxels=83138, n_volumes=184)
    for entry in checkpoint["val_history"]:
        entry["fmri_correlation"] = 0.0013
    evidence = findings_of(document_of(tmp_path, checkpoint), "task.chance_level")[0]["evidence"]
    assert evidence["naive_z"] == pytest.approx(5.08, abs=0.01)
    assert evidence["honest_z"] == pytest.approx([0.1, 0.8], abs=0.01)


def test_a_scale_at_one_is_told_by_its_optimizer_state(tmp_path: Path) -> None:
    causes = {}
    for name, change in {
        "steps_rounded_away": lambda c: None,
        "gradient_exactly_zero": lambda c: [entries(c)[1][k].zero_() for k in ("exp_avg", "exp_avg_sq")],
        "in_the_optimizer_but_never_stepped": lambda c: entries(c).pop(1),
        "no_optimizer_in_the_file": lambda c: c.pop("optimizer_state_dict"),
    }.items():
        checkpoint = small_run(BFLOAT16, lr=1e-4)
        assert bool((weight(checkpoint, "body.1.weight") == 1).all()), "bf16 holds every scale at 1"
        change(checkpoint)
        found = findings_of(document_of(tmp_path, checkpoint), "batchnorm.gamma_at_init")
        tensors = {t["tensor"]: t["cause"] for t in found[0]["evidence"]["tensors"]}
        causes[name] = tensors["body.1.weight"]
    assert causes == {name: name for name in causes}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_bias_at_zero_is_never_explained_by_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    causes = {}
    for name, change in {
        "gradient_exactly_zero": lambda c, i: [entries(c)[i][k].zero_() for k in ("exp_avg", "exp_avg_sq")],
        "in_the_optimizer_but_never_stepped": lambda c, i: entries(c).pop(i),
        "has_gradients_and_steps_that_would_show": lambda c, i: None,
    }.items():
        checkpoint = copy.deepcopy(base_run(dtype))
        weight(checkpoint, "head.bias").zero_()
        change(checkpoint, len(entries(checkpoint)) - 1)
        found = findings_of(document_of(tmp_path, checkpoint), "weights.constant")
        causes[name] = found[0]["evidence"]["tensors"][0]["cause"]
        assert found[0]["where"] == ["head.bias"]
    assert causes == {name: name for name in causes}


def test_a_second_moment_that_float16_underflowed_is_no_zero_gradient(tmp_path: Path) -> None:
    checkpoint = copy.deepcopy(base_run(FLOAT32))
    for entry in entries(checkpoint).values():
        for moment in ("exp_avg", "exp_avg_sq"):
            entry[moment] = (1e-9 * entry[moment]).half()
    assert findings_of(document_of(tmp_path, checkpoint), "optimizer.zero_gradient") == []


def test_an_earlier_checkpoint_can_be_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "checkpoint.pt", tmp_path / "out"
    torch.save(base_run(FLOAT32), path)
    command = [str(path), "--out", str(out), "--device", "cpu", "--against"]
    assert main([*command, str(path)]) == 0
    assert "drift.unchanged" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "nothing.pt")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_earlier_checkpoint_of_another_model_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    earlier, later = tmp_path / "earlier.pt", tmp_path / "later.pt"
    torch.save({"head.weight": torch.zeros(3, 3), "norm.weight": torch.ones(96)}, earlier)
    torch.save(base_run(FLOAT32), later)
    drift = examined(later, earlier)["drift"]
    assert set(drift["tensors"]) == {"norm.weight"}
    assert drift["not_compared"]["head.weight"] == "its shape was [3, 3]"
    assert drift["not_compared"]["head.bias"] == "the earlier checkpoint does not have it"
