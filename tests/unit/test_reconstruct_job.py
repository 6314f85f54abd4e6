"""The job and its preflight with small adapters of all sorts, the examples among them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from remote_payload.checkpoint import read_header
from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct import runner
from remote_payload.reconstruct.__main__ import ConfigError, settings_of
from remote_payload.reconstruct.job import ReconstructError
from remote_payload.reconstruct.job import run as run_job
from remote_payload.reconstruct.preflight import check
from remote_payload.reconstruct.protocol import AdapterBase, Kind, Modality, Sample
from remote_payload.wire.codec import from_json
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy
from remote_payload.wire.results import Outcome, Verdict

pytestmark = pytest.mark.torch
EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("huggingface_adapter", "image_autoencoder_adapter", "plain_module_adapter"):
        sys.modules.pop(name, None)


def make_plan(checkpoint: Path, **settings: Any) -> NodePlan:
    return NodePlan(
        "r",
        "0" * 64,
        (JobSpec("reconstruct"),),
        str(checkpoint),
        EvaluationSettings(**settings),
        GpuPolicy("cpu"),
        OverrunPolicy(),
    )


def run(plan: NodePlan, out: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    run_job(JobContext(plan, "reconstruct", out))
    return read(out)


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "reconstruct.json").read_text())
    assert document["schema_version"] == 1
    assert document["job"] == "reconstruct"
    from_json(Verdict, document["verdict"])
    return document


def task(document: dict[str, Any]) -> str:
    return str(document["verdict"]["dimensions"]["task_evidence"])


def image_case(folder: Path, good: bool) -> NodePlan:
    """Blurry images and an autoencoder that was trained on them, or not."""
    from image_autoencoder_adapter import Autoencoder

    coarse = RNG.random((96, 3, 4, 4))
    images = torch.nn.functional.interpolate(torch.tensor(coarse).float(), size=16, mode="bilinear")
    pixels = (images * 255).round().to(torch.uint8).numpy()
    np.save(folder / "train.npy", pixels[:64])
    np.save(folder / "test.npy", pixels[64:])
    torch.manual_seed(0)
    model = Autoencoder(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs = torch.tensor(pixels[:64]).float() / 255
    for _ in range(60 if good else 0):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), inputs).backward()
        optimizer.step()
    torch.save({"state_dict": model.state_dict()}, folder / "model.pt")
    return make_plan(
        folder / "model.pt",
        adapter="image_autoencoder_adapter:ImageAutoencoderAdapter",
        data={"images": str(folder)},
        user_config={"width": 8, "side": 16},
    )


def test_the_image_example_passes_when_the_model_is_good(examples: None, tmp_path: Path) -> None:
    plan = image_case(tmp_path, good=True)
    assert check(plan, read_header(plan.checkpoint_path)) == []
    document = run(plan, tmp_path / "out")
    assert task(document) == "pass"
    assert len([p for p in document["pictures"] if p["role"] == "comparison"]) == 4


def test_the_image_example_fails_when_the_model_is_untrained(examples: None, tmp_path: Path) -> None:
    assert task(run(image_case(tmp_path, good=False), tmp_path / "out")) == "fail"


def test_the_huggingface_example_passes_and_runs_no_code_of_the_folder(examples: None, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    image_case(tmp_path, good=False)
    inputs = torch.tensor(np.load(tmp_path / "train.npy")).float() / 255
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForMaskedImageModeling(ViTConfig(**sizes, image_size=16, patch_size=4, encoder_stride=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs).reconstruction, inputs).backward()
        optimizer.step()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForMaskedImageModeling": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('this must not run')")
    plan = make_plan(
        folder / "model.safetensors",
        adapter="huggingface_adapter:HuggingFaceAdapter",
        data={"images": str(tmp_path)},
        user_config={"model": str(folder)},
    )
    assert check(plan, read_header(plan.checkpoint_path)) == []
    assert task(run(plan, tmp_path / "out")) == "pass"


def encoding_case(folder: Path) -> NodePlan:
    weights = RNG.standard_normal((12, 30))
    for split in ("train", "test"):
        features = RNG.standard_normal((150, 12)).astype(np.float32)
        np.save(folder / f"{split}_features.npy", features)
        noise = RNG.standard_normal((150, 30))
        np.save(folder / f"{split}_bold.npy", (features @ weights + noise).astype(np.float32))
    linear = nn.Linear(12, 30)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weights.T))
        linear.bias.zero_()
    torch.save({f"regression.{name}": t for name, t in linear.state_dict().items()}, folder / "model.pt")
    return make_plan(
        folder / "model.pt",
        adapter="plain_module_adapter:EncodingAdapter",
        data={"recording": str(folder)},
        user_config={"features": 12, "voxels": 30},
    )


def test_the_plain_module_example_passes_and_draws_its_histogram(examples: None, tmp_path: Path) -> None:
    plan = encoding_case(tmp_path)
    assert check(plan, read_header(plan.checkpoint_path)) == []
    document = run(plan, tmp_path / "out")
    assert task(document) == "pass"
    assert [p["role"] for p in document["pictures"]] == ["histogram"]
    median = next(m for m in document["metrics"] if m["id"] == "voxelwise_correlation_median")
    assert median["value"] > 0.8
    assert abs(median["chance"]) < 0.1


def test_the_example_config_is_valid_here_and_for_the_client(tmp_path: Path) -> None:
    from orchestrator.config import load_config

    path = EXAMPLES / "eval.yaml"
    loaded = load_config(path, num_samples=4, adapter=None, variables={"DEMO_DATA": "/data/film"}, data_base=None)
    text = path.read_text()
    here = settings_of(yaml.safe_load(text), path.name, text)
    assert loaded.settings.adapter == here.adapter == "remote_payload.reference.adapter:ReferenceAdapter"


def test_without_an_adapter_it_is_not_measured_and_says_what_is_missing(tmp_path: Path) -> None:
    document = run(make_plan(tmp_path / "does-not-matter.pt"), tmp_path)
    assert task(document) == "not_measured"
    (finding,) = document["findings"]
    assert (finding["id"], finding["severity"]) == ("reconstruct.no_adapter", "info")
    assert "adapter" in finding["action"]


def test_without_an_adapter_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from remote_payload.reconstruct.__main__ import main;"
        f"main(['--checkpoint', 'x', '--out', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip().endswith("False")


class Tiny(AdapterBase):
    """Four numbers in, the same out; the tests change what they need."""

    kind, layout, shape, bounds = Kind.IMAGE, "HW", (2, 4), (0.0, 1.0)
    count = 40

    def build_model(self, config: Any) -> nn.Module:
        return nn.Linear(8, 8)

    def modalities(self, data: Any, config: Any) -> Any:
        return [Modality("m", self.kind, self.layout, self.shape, self.bounds, "u")]

    def target(self, index: int) -> Any:
        return np.random.default_rng(index).random((2, 4)).astype(np.float32)

    def samples(self, split: str, data: Any, config: Any) -> Any:
        return [Sample(f"s{i}", {"x": self.target(i)}, {"m": self.target(i)}) for i in range(self.count)]

    def train_reference(self, data: Any, config: Any) -> Any:
        return self.samples("train", data, config)

    def predict(self, model: Any, batch: Any) -> Any:
        return {"m": model(batch["x"].flatten(1)).view(-1, 2, 4)}


class Raises(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        raise ZeroDivisionError("no way")


class WrongShape(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        return {"m": model(batch["x"].flatten(1))}


class Forgets(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        return {"n": batch["x"]}


class Bytes(Tiny):
    """Data of 0…255 and a sigmoid head."""

    bounds = (0.0, 255.0)

    def target(self, index: int) -> Any:
        return super().target(index) * 255

    def predict(self, model: Any, batch: Any) -> Any:
        return {"m": torch.sigmoid(model(batch["x"].flatten(1))).view(-1, 2, 4)}


class UndeclaredBytes(Bytes):
    bounds = (0.0, 1.0)


class Empty(Tiny):
    count = 0


class Nan(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        return {"m": torch.full((len(batch["x"]), 2, 4), float("nan"))}


class OldSignature(Tiny):
    def samples(self, split: str, root: str) -> Any:  # type: ignore[override]
        return []


class Hungry(Tiny):
    """Runs out of memory above three samples."""

    seen: ClassVar[list[int]] = []

    def predict(self, model: Any, batch: Any) -> Any:
        self.seen.append(len(batch["x"]))
        if len(batch["x"]) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().predict(model, batch)


class Starving(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class NoReference(Tiny):
    def train_reference(self, data: Any, config: Any) -> Any:
        return None


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., NodePlan]:
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(8))
        linear.bias.zero_()
    torch.save({"model": linear.state_dict()}, tmp_path / "tiny.pt")

    def of(adapter: type, **settings: Any) -> NodePlan:
        return make_plan(tmp_path / "tiny.pt", adapter=f"{adapter.__module__}:{adapter.__name__}", **settings)

    return of


def preflight(plan: NodePlan) -> list[str]:
    return [f.id for f in check(plan, read_header(plan.checkpoint_path))]


def test_a_perfect_copy_passes(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    document = run(tiny(Tiny), tmp_path)
    assert task(document) == "pass"
    assert document["model"] | {"state_path": None} == {
        "entries": 2,
        "parameters": 72,
        "tied_names": 0,
        "dtype": "float32",
        "device": "cpu",
        "dropped_entries": [],
        "state_path": None,
    }


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (Raises, "ZeroDivisionError: no way"),
        (WrongShape, "declared is (8, 2, 4)"),
        (Forgets, "declared and not given: ['m']"),
        (Empty, "has no samples"),
    ],
)
def test_an_adapter_that_breaks_its_word_fails_the_job_and_leaves_a_document(
    tiny: Callable[..., NodePlan], tmp_path: Path, adapter: type, told: str
) -> None:
    with pytest.raises(ReconstructError):
        run(tiny(adapter), tmp_path)
    document = read(tmp_path)
    assert task(document) == "not_measured"
    assert told in document["findings"][0]["title"]


@pytest.mark.parametrize(
    ("adapter", "finding"),
    [
        (Tiny, None),
        (Raises, "adapter.predict_failed"),
        (WrongShape, "adapter.mismatch"),
        (Forgets, "adapter.mismatch"),
        (Empty, "adapter.mismatch"),
        (Bytes, "reconstruct.range_mismatch"),
        (UndeclaredBytes, "reconstruct.range_mismatch"),
        (OldSignature, "adapter.signature_mismatch"),
    ],
)
def test_the_preflight_finds_it_on_one_sample(
    tiny: Callable[..., NodePlan], adapter: type, finding: str | None
) -> None:
    assert preflight(tiny(adapter)) == ([] if finding is None else [finding])


def test_the_preflight_says_what_a_method_takes_and_what_it_is_given(tiny: Callable[..., NodePlan]) -> None:
    plan = tiny(OldSignature)
    (found,) = check(plan, read_header(plan.checkpoint_path))
    assert "root: " in found.title
    assert "AdapterConfig" in found.title


def test_a_missing_module_is_a_finding_and_not_an_exception(tiny: Callable[..., NodePlan]) -> None:
    plan = make_plan(Path(tiny(Tiny).checkpoint_path), adapter="not_shipped:Adapter")
    assert preflight(plan) == ["adapter.mismatch"]


@pytest.mark.parametrize("adapter", [Bytes, UndeclaredBytes])
def test_what_cannot_match_gets_no_number(tiny: Callable[..., NodePlan], tmp_path: Path, adapter: type) -> None:
    document = run(tiny(adapter), tmp_path)
    assert task(document) == "not_measured"
    assert [f["id"] for f in document["findings"]] == ["reconstruct.range_mismatch"]
    assert [m["value"] for m in document["metrics"]] == [None]
    assert "not measured" in document["headline"]


def test_nan_outputs_fail_and_the_document_is_still_json(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    document = run(tiny(Nan), tmp_path)
    assert task(document) == "fail"
    assert "task.non_finite_output" in [f["id"] for f in document["findings"]]


def test_running_out_of_memory_halves_the_batch_and_loses_no_sample(
    tiny: Callable[..., NodePlan], tmp_path: Path
) -> None:
    Hungry.seen.clear()
    halved = run(tiny(Hungry, batch_size=16), tmp_path / "a")
    assert Hungry.seen[:4] == [16, 8, 4, 2]
    assert set(Hungry.seen[4:]) == {2}
    assert "reconstruct.batch_halved" in [f["id"] for f in halved["findings"]]
    whole = run(tiny(Tiny, batch_size=2), tmp_path / "b")
    assert halved["metrics"] == whole["metrics"]


def test_a_single_sample_that_does_not_fit_ends_the_job(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(tiny(Starving), tmp_path)


def test_without_a_training_reference_nothing_passes(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    document = run(tiny(NoReference), tmp_path)
    assert task(document) == "not_measured"
    assert "reconstruct.no_train_reference" in [f["id"] for f in document["findings"]]


def test_a_checkpoint_of_another_shape_fails_the_job_with_its_finding(
    tiny: Callable[..., NodePlan], tmp_path: Path
) -> None:
    plan = tiny(Tiny)
    torch.save({"model": nn.Linear(8, 9).state_dict()}, plan.checkpoint_path)
    with pytest.raises(ReconstructError):
        run(plan, tmp_path)
    assert [f["id"] for f in read(tmp_path)["findings"]] == ["structure.shape_mismatch"]


def test_a_checkpoint_cut_in_half_fails_the_job_with_a_finding(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    plan = tiny(Tiny)
    path = Path(plan.checkpoint_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReconstructError):
        run(plan, tmp_path)
    assert read(tmp_path)["findings"]


def test_a_checkpoint_without_its_last_bytes_is_never_evaluated_in_silence(
    tiny: Callable[..., NodePlan], tmp_path: Path
) -> None:
    plan = tiny(Tiny)
    path = Path(plan.checkpoint_path)
    path.write_bytes(path.read_bytes()[:-200])
    with contextlib.suppress(ReconstructError):
        run(plan, tmp_path)
    assert [f for f in read(tmp_path)["findings"] if f["severity"] in ("error", "warning")]


def test_progress_goes_through_the_phases_in_order(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    run_job(JobContext(tiny(Tiny), "reconstruct", tmp_path, writing))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        events = [json.loads(line) for line in pipe]
    phases = list(dict.fromkeys(e["phase"] for e in events))
    assert phases == ["cuda", "load", "first_batch", "run"]
    assert {"phase": "run", "counter": 40, "total": 40, "message": "samples"} in events


@pytest.mark.parametrize(("available", "wanted", "expected"), [(5, None, 5), (5, 9, 5), (100, 7, 7), (3, 1, 1)])
def test_evaluated_samples_are_spread_in_order(available: int, wanted: int | None, expected: int) -> None:
    positions = runner.choose_positions(available, wanted)
    assert len(positions) == expected
    assert positions == sorted(set(positions))


def test_algorithms_are_deterministic_and_the_compiler_is_told_only_where_an_adapter_needs_it() -> None:
    code = (
        "import sys, torch\n"
        "from remote_payload.reconstruct.runner import make_deterministic\n"
        "make_deterministic(0)\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not {'torch._inductor', 'torch._dynamo'} & set(sys.modules)\n"
        "from torch._inductor import config\n"
        "assert config.deterministic\n"
        "config.deterministic = False\n"
        "make_deterministic(0)\n"
        "assert config.deterministic\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=EXAMPLES.parent, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_a_nested_batch_is_moved_and_only_floats_change_type() -> None:
    batch = {"x": [torch.ones(2), torch.ones(2, dtype=torch.int64)], "name": "kept"}
    moved = runner.to_device(batch, torch.device("cpu"), torch.bfloat16)
    assert [t.dtype for t in moved["x"]] == [torch.bfloat16, torch.int64]
    assert moved["name"] == "kept"


def test_bfloat16_predictions_are_scored(tiny: Callable[..., NodePlan], tmp_path: Path) -> None:
    document = run(tiny(Tiny, dtype="bfloat16"), tmp_path)
    assert document["model"]["dtype"] == "bfloat16"
    assert task(document) == "pass"


def test_an_unknown_key_of_the_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="adaptor"):
        settings_of({"remote_eval": {"adaptor": "x:Y"}}, "c.yaml", "")


def test_a_config_of_the_users_own_reaches_the_adapter_as_text() -> None:
    settings = settings_of({"lr": 1}, "train.yaml", "lr: 1\n")
    assert (settings.user_config_name, settings.user_config_text) == ("train.yaml", "lr: 1\n")


def test_it_works_alone_from_the_command_line(examples: None, tmp_path: Path) -> None:
    plan = image_case(tmp_path, good=True)
    config = tmp_path / "eval.yaml"
    section = {"adapter": plan.settings.adapter, "data": plan.settings.data, "user_config": plan.settings.user_config}
    config.write_text(yaml.safe_dump({"remote_eval": section}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "remote_payload.reconstruct", "--checkpoint", plan.checkpoint_path]
    ran = subprocess.run(
        [*command, "--config", str(config), "--out", str(out), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "beats the train mean" in ran.stdout
    assert task(read(out)) == Outcome.PASS.value
