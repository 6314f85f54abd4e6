"""What goes first: with the header's chunks and the weights' alone, `reconstruct` reads all that it reads."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orchestrator.inspection import inspect_local
from orchestrator.transfer.order import ChunkClass, TensorBytes, classify, sending_order, tensor_bytes
from orchestrator.transfer.upload import upload_file
from remote_payload.checkpoint import Section, read_header
from remote_payload.checkpoint.errors import BytesNotSentError
from remote_payload.checkpoint.torch_tensors import load_tensor
from remote_payload.health import job as health_job
from remote_payload.health.job import run as run_health
from remote_payload.jobs.context import JobContext
from remote_payload.jobs.rest import Rest, RestNeverCameError
from remote_payload.wire.chunks import Chunk, ChunkManifest, digest_file
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy
from tests.support.agent_streams import ThreadOpener, make_node_root
from tests.support.checkpoints import safetensors_bytes

SIZE = 400
SPANS = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 60)), max_size=12)
Classified = tuple[ChunkManifest, list[ChunkClass]]


def facts(section: str, spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"section": section, "file_offset": at, "span_bytes": min(length, SIZE - at)} for at, length in spans]


def covered(spans: list[tuple[int, int]]) -> set[int]:
    return {byte for at, length in spans for byte in range(at, min(at + length, SIZE))}


def cut(borders: list[int]) -> ChunkManifest:
    edges = sorted({0, SIZE, *borders})
    return ChunkManifest("", SIZE, tuple(Chunk(a, b - a, "") for a, b in itertools.pairwise(edges)))


@settings(max_examples=400, deadline=None)
@given(SPANS, SPANS, SPANS, st.lists(st.integers(0, SIZE), max_size=30))
def test_every_chunk_goes_once_and_none_waits_that_holds_more_than_other_tensors(
    weights: list[tuple[int, int]],
    others: list[tuple[int, int]],
    reads: list[tuple[int, int]],
    borders: list[int],
) -> None:
    manifest = cut(borders)
    tensors = [*facts("model", weights), *facts("optimizer", others)]
    classes = classify(manifest.spans, tensor_bytes({"tensors": tensors}, reads))
    in_weights = covered(weights) - covered(reads)
    in_rest = covered(others) - covered(weights) - covered(reads)
    for chunk, found in zip(manifest.chunks, classes, strict=True):
        held = set(range(chunk.offset, chunk.offset + chunk.length))
        if held <= in_rest:
            assert found is ChunkClass.REST
        elif held <= in_rest | in_weights:
            assert found is ChunkClass.WEIGHTS
        else:
            assert found is ChunkClass.HEADER
    order = sending_order(classes)
    assert sorted(order) == list(range(len(manifest.chunks)))
    assert order == sorted(order, key=lambda index: (classes[index], index))


def trained(width: int = 192) -> dict[str, Any]:
    """Its tensors are records of their own, but for some of the smallest."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, width)).pow(2).mean().backward()
        optimizer.step()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "epoch": 3,
        "config": {"width": width},
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "ema_state_dict": average,
        "best": torch.tensor(0.5),
    }


def as_zip(path: Path) -> None:
    torch.save(trained(), path)


def as_legacy(path: Path) -> None:
    torch.save(trained(), path, _use_new_zipfile_serialization=False)


def with_views(path: Path) -> None:
    """Weights that are parts of one storage which the optimizer has others of, and the reverse."""
    flat, moments = torch.randn(4, 40_000), torch.randn(3, 40_000)
    torch.save(
        {
            "model_state_dict": {"a.weight": flat[0].view(200, 200), "b.weight": moments[1].view(200, 200)},
            "optimizer_state_dict": {
                "state": {0: {"step": flat[3, 7], "exp_avg": moments[0]}, 1: {"exp_avg": flat[2], "exp_avg_sq": flat}},
                "param_groups": [{"params": [0, 1], "lr": 1e-3}],
            },
        },
        path,
    )


def as_safetensors(path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in trained()["model_state_dict"].items()}
    header, data = {}, b""
    names = {torch.float32: "F32", torch.int64: "I64"}
    for name, value in tensors.items():
        raw = value.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


def a_plan(path: str) -> NodePlan:
    jobs = (JobSpec("health"),)
    return NodePlan("run", "1" * 64, jobs, path, EvaluationSettings(), GpuPolicy(device="cpu"), OverrunPolicy())


WRITERS: list[Callable[[Path], None]] = [as_zip, as_legacy, with_views, as_safetensors]


def classified(path: Path) -> Classified:
    data = path.read_bytes()
    manifest = digest_file(io.BytesIO(data), len(data))
    inspected = inspect_local(path)
    return manifest, classify(manifest.spans, tensor_bytes(inspected["header"], inspected["reads"]))


@pytest.mark.parametrize("write", WRITERS)
def test_without_the_rest_the_header_and_every_weight_are_what_they_are_with_it(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path, holed = tmp_path / "whole", tmp_path / "holed"
    write(path)
    manifest, classes = classified(path)
    data = bytearray(path.read_bytes())
    for chunk, found in zip(manifest.chunks, classes, strict=True):
        if found is ChunkClass.REST:
            data[chunk.offset : chunk.offset + chunk.length] = b"\xa5" * chunk.length
    holed.write_bytes(data)
    whole_header, holed_header = read_header(path), read_header(holed)
    left_out = ("path", "fingerprint", "files")
    whole_facts, holed_facts = whole_header.to_json(), holed_header.to_json()
    assert {k: v for k, v in whole_facts.items() if k not in left_out} == {
        k: v for k, v in holed_facts.items() if k not in left_out
    }
    assert whole_header.model_tensors()
    for tensor in whole_header.model_tensors():
        assert torch.equal(load_tensor(whole_header, tensor.name), load_tensor(holed_header, tensor.name))


@pytest.mark.parametrize("write", [as_zip, with_views, as_safetensors])
def test_with_the_rest_away_weights_are_read_and_health_says_nothing(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "whole"
    write(path)
    manifest, classes = classified(path)
    root, order = make_node_root(tmp_path), sending_order(classes)
    opener = ThreadOpener(root)
    kept = upload_file(opener, path, manifest, order=[n for n in order if classes[n] is not ChunkClass.REST])
    assert kept.is_complete == (ChunkClass.REST not in classes)
    whole, part = read_header(path), read_header(kept.path_on_node)
    assert part.tensors == whole.tensors
    for tensor in whole.model_tensors():
        assert torch.equal(load_tensor(whole, tensor.name), load_tensor(part, tensor.name))
    if kept.is_complete:
        return
    rest = [t for t in whole.tensors if t.section is Section.OPTIMIZER and t.nbytes and t.nbytes >= 64 * 1024]
    assert rest
    for tensor in rest:
        with pytest.raises(BytesNotSentError):
            load_tensor(part, tensor.name)
    context = JobContext(a_plan(kept.path_on_node), "health", tmp_path / "artifacts")
    monkeypatch.setattr(health_job, "Rest", functools.partial(Rest, limit_s=0.2))
    with pytest.raises(RestNeverCameError):
        run_health(context)
    assert not (tmp_path / "artifacts").exists()


def test_a_header_that_was_not_sent_in_full_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "whole"
    as_zip(path)
    manifest, classes = classified(path)
    root = make_node_root(tmp_path)
    for index, found in enumerate(classes):
        if found is ChunkClass.HEADER:
            others = [n for n in range(len(classes)) if n != index]
            kept = upload_file(ThreadOpener(root), path, manifest, order=others)
            with pytest.raises(BytesNotSentError):
                read_header(kept.path_on_node)
            shutil.rmtree(kept.path_on_node.rpartition("/")[0])


def test_of_a_file_with_moments_and_an_average_two_thirds_and_more_are_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"
    as_zip(path)
    manifest, classes = classified(path)
    sums = dict.fromkeys(ChunkClass, 0)
    for chunk, found in zip(manifest.chunks, classes, strict=True):
        sums[found] += chunk.length
    assert sums[ChunkClass.REST] > 0.7 * manifest.size
    assert sums[ChunkClass.WEIGHTS] == 192 * 192 * 4


def test_of_a_file_without_tensors_all_is_header() -> None:
    assert classify(cut([10, 20]).spans, tensor_bytes({"tensors": []}, [])) == [ChunkClass.HEADER] * 3
    assert classify(cut([10, 20]).spans, TensorBytes((), ())) == [ChunkClass.HEADER] * 3


def test_the_order_is_told_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"
    as_zip(path)
    script = (
        "import sys; from pathlib import Path; from orchestrator.inspection import inspect_local;"
        "from orchestrator.transfer.order import tensor_bytes;"
        "inspected = inspect_local(Path(sys.argv[1]));"
        "found = tensor_bytes(inspected['header'], inspected['reads']);"
        "import json; print(json.dumps([len(found.weights), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, timeout=60, check=True)
    count, imported = json.loads(done.stdout)
    assert (count > 0, imported) == (True, False)
