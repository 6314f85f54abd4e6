"""The health job as a whole: its document, its findings planted one by one, its verdict."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.health.__main__ import main
from remote_payload.health.job import examine, run
from remote_payload.jobs.context import JobContext
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy
from remote_payload.wire.results import Dimension
from remote_payload.wire.states import Phase
from tests.support.checkpoints import (
    HOSTILE_NAMES,
    CodeOnLoad,
    hostile_pickles,
    not_checkpoints,
    reference_checkpoint,
    torch_zip_of,
    trained_small_checkpoint,
)

Plant = Callable[[dict[str, Any]], None]


def context_for(path: Path, out: Path) -> JobContext:
    plan = NodePlan(
        run_id="test",
        payload_sha256="",
        jobs=(JobSpec("health"),),
        checkpoint_path=str(path),
        settings=EvaluationSettings(),
        gpu=GpuPolicy(device="cpu"),
        overrun=OverrunPolicy(),
    )
    return JobContext(plan, "health", out)


def examined(path: Path) -> dict[str, Any]:
    document = examine(str(path), "cpu", context_for(path, path.parent))
    return dict(json.loads(json.dumps(document, allow_nan=False)))


def health_of(tmp_path: Path, checkpoint: Any) -> dict[str, Any]:
    path = tmp_path / "c.pt"
    torch.save(checkpoint, path)
    return examined(path)


def healthy_checkpoint() -> dict[str, Any]:
    checkpoint = reference_checkpoint(dtype=torch.float32)
    checkpoint["config"]["batch_size"] = 16
    return checkpoint


def found(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f["id"]: f for f in document["findings"]}


def test_a_healthy_reference_checkpoint_has_no_warning_and_its_exact_table(tmp_path: Path) -> None:
    document = health_of(tmp_path, healthy_checkpoint())
    assert [f["id"] for f in document["findings"] if f["severity"] != "info"] == []
    assert document["classes"]["counts"] == {
        "batchnorm_layers": 22,
        "weight_matrices": 26,
        "embeddings": 0,
        "norm_scales": 22,
        "bias_entries": 48,
        "biases": 26,
        "norm_shifts": 22,
        "running_statistics": 44,
        "counters": 22,
        "other": 0,
    }
    assert document["verdict"]["dimensions"]["integrity"] == "pass"
    assert document["verdict"]["dimensions"]["numerics"] == "pass"
    assert document["verdict"]["dimensions"]["task_evidence"] == "not_measured"
    assert document["header"]["entry_count"] == 162
    assert all(t["statistics"] for t in document["tensors"])


def test_every_dimension_has_an_outcome_and_a_reason(tmp_path: Path) -> None:
    for document in (health_of(tmp_path, trained_small_checkpoint()), examined_text(tmp_path)):
        verdict = document["verdict"]
        assert set(verdict["dimensions"]) == set(verdict["reasons"]) == {d.value for d in Dimension}
        assert all(verdict["reasons"].values())
        assert document["schema_version"] == 1
        assert document["job"] == "health"


def examined_text(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "notes.txt"
    path.write_text("nothing here")
    return examined(path)


def weights(checkpoint: dict[str, Any]) -> OrderedDict[str, torch.Tensor]:
    state: OrderedDict[str, torch.Tensor] = checkpoint["model_state_dict"]
    return state


def plant_nan(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.layer5.0.weight"][3, 2] = math.nan


def plant_nan_in_moment(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_state_dict"]["state"][4]["exp_avg"].view(-1)[0] = math.nan


def plant_inf(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.layer5.0.bias"][1] = -math.inf


def plant_constant(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["decoder.layer8.0.weight"].fill_(0.25)


def plant_zero_bias(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["decoder.layer8.0.bias"].zero_()


def plant_gamma(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.bottleneck_to_voxels.1.weight"].fill_(1)


def plant_negative_variance(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.layer5.1.running_var"][0] = -1


def plant_zero_variance(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.layer5.1.running_var"][0] = 0


def plant_large_variance(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.video_encoder.bn1.running_var"][0] = 7_274_496


def plant_double_counter(checkpoint: dict[str, Any]) -> None:
    for name in ("encoder.layer5.1", "decoder.layer8.1"):
        weights(checkpoint)[f"{name}.num_batches_tracked"].fill_(2726)


def plant_other_counter(checkpoint: dict[str, Any]) -> None:
    weights(checkpoint)["encoder.layer5.1.num_batches_tracked"].fill_(700)


@pytest.mark.parametrize(
    ("plant", "finding", "severity", "where", "dimension", "outcome"),
    [
        (plant_nan, "values.nan", "error", "encoder.layer5.0.weight", "numerics", "fail"),
        (plant_nan_in_moment, "values.nan", "error", "optimizer_state_dict/state/4/exp_avg", "numerics", "fail"),
        (plant_inf, "values.inf", "error", "encoder.layer5.0.bias", "numerics", "fail"),
        (plant_constant, "weights.constant", "warning", "decoder.layer8.0.weight", "numerics", "warn"),
        (plant_zero_bias, "weights.constant", "info", "decoder.layer8.0.bias", "numerics", "pass"),
        (
            plant_gamma,
            "batchnorm.gamma_at_init",
            "warning",
            "encoder.bottleneck_to_voxels.1.weight",
            "numerics",
            "warn",
        ),
        (
            plant_negative_variance,
            "batchnorm.running_var_nonpositive",
            "error",
            "encoder.layer5.1.running_var",
            "numerics",
            "fail",
        ),
        (
            plant_zero_variance,
            "batchnorm.running_var_nonpositive",
            "warning",
            "encoder.layer5.1.running_var",
            "numerics",
            "warn",
        ),
        (
            plant_large_variance,
            "batchnorm.running_var_large",
            "warning",
            "encoder.video_encoder.bn1.running_var",
            "numerics",
            "warn",
        ),
        (
            plant_double_counter,
            "batchnorm.counter_mismatch",
            "warning",
            "encoder.layer5.1.num_batches_tracked",
            "training_dynamics",
            "warn",
        ),
        (
            plant_other_counter,
            "batchnorm.counter_mismatch",
            "info",
            "encoder.layer5.1.num_batches_tracked",
            "training_dynamics",
            None,
        ),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_planted_defect_is_found_where_it_is(
    tmp_path: Path, plant: Plant, finding: str, severity: str, where: str, dimension: str, outcome: str | None
) -> None:
    checkpoint = healthy_checkpoint()
    plant(checkpoint)
    document = health_of(tmp_path, checkpoint)
    details = found(document)[finding]
    assert details["severity"] == severity
    assert where in details["where"]
    assert details["dimension"] == dimension
    assert details["evidence"]
    assert details["explanation"]
    assert details["action"]
    assert details["refuted_by"]
    assert outcome is None or document["verdict"]["dimensions"][dimension] == outcome


def test_a_large_variance_is_also_named_as_beyond_fp16(tmp_path: Path) -> None:
    checkpoint = healthy_checkpoint()
    plant_large_variance(checkpoint)
    overflow = found(health_of(tmp_path, checkpoint))["values.fp16_overflow"]
    assert overflow["severity"] == "info"
    assert overflow["evidence"]["tensors"][0]["maximum"] == 7_274_496


def test_where_a_nan_is_stands_in_the_evidence(tmp_path: Path) -> None:
    checkpoint = healthy_checkpoint()
    plant_nan(checkpoint)
    evidence = found(health_of(tmp_path, checkpoint))["values.nan"]["evidence"]
    assert evidence["tensors"][0]["first"] == [[3, 2]]


@pytest.mark.parametrize(
    "build",
    [
        lambda: trained_small_checkpoint(),
        lambda: torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32)).state_dict(),
        lambda: torch.nn.TransformerEncoderLayer(32, 4).state_dict(),
        lambda: torch.nn.LSTM(8, 8, 2).state_dict(),
        lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.PReLU(8)).state_dict(),
        lambda: {"mask": torch.full((4, 4), -math.inf).triu(1), "w.weight": torch.randn(4, 4)},
        lambda: {"h.attn.bias": torch.tril(torch.ones(1, 1, 8, 8)).bool(), "position_ids": torch.arange(9)},
        lambda: {"lora_B.weight": torch.zeros(8, 4), "lora_A.weight": torch.randn(4, 8)},
    ],
    ids=["trained", "fresh_batchnorm", "transformer", "lstm", "conv", "mask", "gpt_buffers", "lora"],
)
def test_healthy_layouts_get_no_warning_and_no_error(tmp_path: Path, build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    document = health_of(tmp_path, build())
    assert [f for f in document["findings"] if f["severity"] != "info"] == []


def test_a_flipped_bit_fails_integrity_and_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), path)
    from remote_payload.checkpoint import read_header

    tensor = read_header(path).tensor("encoder.layer6.0.weight")
    data = bytearray(path.read_bytes())
    data[(tensor.file_offset or 0) + 5] ^= 1
    path.write_bytes(data)
    document = examined(path)
    mismatch = found(document)["integrity.crc_mismatch"]
    assert mismatch["where"] == ["encoder.layer6.0.weight"]
    assert document["verdict"]["dimensions"]["integrity"] == "fail"
    assert document["verdict"]["overall"] == "fail"


def test_a_truncated_checkpoint_gets_its_document(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), path)
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 30_000, 200, 3):
        path.write_bytes(data[:length])
        document = examined(path)
        assert document["verdict"]["dimensions"]["integrity"] == "fail", length
        assert "integrity.truncated" in found(document) or length == 3


@pytest.mark.parametrize("kind", sorted(not_checkpoints()))
def test_a_file_that_is_no_checkpoint_gets_its_document(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(not_checkpoints()[kind])
    document = examined(path)
    assert document["header"] is None
    assert document["verdict"]["dimensions"]["integrity"] == "fail"
    assert document["verdict"]["dimensions"]["numerics"] == "not_measured"


@pytest.mark.parametrize("kind", sorted(hostile_pickles(Path("unused"))))
def test_a_hostile_pickle_gets_its_document_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "c.pt"
    path.write_bytes(torch_zip_of(hostile_pickles(marker)[kind]))
    document = examined(path)
    assert found(document)["security.unsafe_global"]["severity"] == "error"
    assert document["verdict"]["dimensions"]["integrity"] == "fail"
    assert not marker.exists()


def test_weights_beside_a_hostile_object_are_measured(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    document = health_of(tmp_path, {**trained_small_checkpoint(), "x": CodeOnLoad(marker)})
    assert found(document)["security.unsafe_global"]["where"] == ["posix.system"]
    assert document["verdict"]["dimensions"]["integrity"] == "fail"
    assert document["verdict"]["dimensions"]["numerics"] == "pass"
    assert not marker.exists()


def test_a_checkpoint_without_checksums_passes_integrity_with_that_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.randn(8, 8)}, path)
    document = examined(path)
    assert document["verdict"]["dimensions"]["integrity"] == "pass"
    assert "1 of 1 records carry no checksum" in document["verdict"]["reasons"]["integrity"]
    assert "checksum;" not in document["verdict"]["reasons"]["integrity"]


class TouchingContext(JobContext):
    """Writes to the checkpoint while it is read, as a training run does that still saves."""

    touched = False

    def progress(self, phase: Phase, counter: int = 0, total: int | None = None, message: str = "") -> None:
        if phase is Phase.RUN and not self.touched:
            self.touched = True
            os.utime(self.plan.checkpoint_path, (1, 1))


def test_a_file_that_changes_while_it_is_read_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), path)
    context = TouchingContext(context_for(path, tmp_path).plan, "health", tmp_path)
    document = examine(str(path), "cpu", context)
    assert "integrity.changed_while_read" in found(document)
    assert document["verdict"]["dimensions"]["integrity"] == "fail"


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(healthy_checkpoint(), path)
    texts = []
    for name in ("one", "two"):
        run(context_for(path, tmp_path / name))
        texts.append((tmp_path / name / "health.json").read_bytes())
    assert texts[0] == texts[1]


def test_hostile_names_and_unbounded_numbers_are_valid_json(tmp_path: Path) -> None:
    state: dict[str, Any] = {n: torch.full((3,), math.nan) for n in HOSTILE_NAMES}
    path = tmp_path / "c.pt"
    state.pop("\ud800 lone")
    torch.save({"state_dict": state, "loss": math.inf, "epoch": 10**400, "config": {"a": math.nan}}, path)
    document = examined(path)
    assert document["header"]["scalars"]["loss"] == "Infinity"
    assert document["header"]["config"]["a"] == "NaN"
    assert found(document)["values.nan"]


def test_the_command_works_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(reference_checkpoint(), path)
    command = [
        sys.executable,
        "-m",
        "remote_payload.health",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("verdict: ")
    document = json.loads((tmp_path / "out" / "health.json").read_text())
    assert document["header"]["parameter_count"] == document["header"]["parameter_count"] > 0


def test_a_missing_file_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "health.json").exists()


def test_progress_reaches_the_supervisors_pipe(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(trained_small_checkpoint(), path)
    plan = context_for(path, tmp_path).plan
    with (tmp_path / "events").open("wb") as pipe:
        run(JobContext(plan, "health", tmp_path, pipe.fileno()))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [e["phase"] for e in events][:3] == ["load", "import", "cuda"]
    assert events[-1]["counter"] == events[-1]["total"] > 0
