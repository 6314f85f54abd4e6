"""The split over several processes, and over several attempts: the same bytes as from one that did it all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct import devices
from remote_payload.reconstruct.devices import DeviceProcessError
from remote_payload.reconstruct.job import ReconstructError
from remote_payload.reconstruct.job import run as run_job
from remote_payload.reconstruct.prediction import PredictionStore
from remote_payload.reconstruct.runner import pick_devices
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy
from tests.support.sharded_adapter import AT, COUNT, LOG, Small

pytestmark = pytest.mark.torch
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "small.pt"
    torch.manual_seed(0)
    torch.save({"model_state_dict": Small().state_dict()}, path)
    return path


@pytest.fixture(autouse=True)
def _threads_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums come out in another order with another number of threads, and other tests set theirs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    return tmp_path / "log"


def plan(checkpoint: Path, processes: int, **settings: Any) -> NodePlan:
    given = {"adapter": "tests.support.sharded_adapter:Sharded", "batch_size": 4, "num_samples": 2, **settings}
    return NodePlan(
        "20261101-000000-abcdef",
        "0" * 64,
        (JobSpec("reconstruct"),),
        str(checkpoint),
        EvaluationSettings(**given),
        GpuPolicy("cpu", processes),
        OverrunPolicy(),
        plan_key="p",
    )


def run(plan: NodePlan, out: Path, *earlier: Path, scratch: Path | None = None) -> dict[str, bytes]:
    """The job's artifacts by name."""
    out.mkdir(exist_ok=True)
    run_job(JobContext(plan, "reconstruct", out, scratch=scratch, earlier_scratch=earlier))
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def batches(log: Path) -> list[tuple[int, int, int]]:
    """(process, samples, first sample) of every batch that went through a model."""
    found = [line.split() for line in log.read_text().splitlines()]
    return [(int(pid), int(size), int(first)) for pid, size, first in found]


def test_three_processes_give_the_bytes_of_one(
    checkpoint: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(plan(checkpoint, 1), tmp_path / "one")
    assert {pid for pid, _, _ in batches(log)} == {os.getpid()}
    log.unlink()
    monkeypatch.setenv(AT, "meet:3")
    several = run(plan(checkpoint, 3), tmp_path / "several")
    assert several == one
    assert len(one) > 3
    made = batches(log)
    assert sorted(first for _, _, first in made) == list(range(0, COUNT, 4))
    assert len({pid for pid, _, _ in made}) == 3
    assert os.getpid() not in {pid for pid, _, _ in made}


def test_samples_are_in_their_order_whoever_was_first(checkpoint: Path, tmp_path: Path) -> None:
    found = run(plan(checkpoint, 3, batch_size=1), tmp_path / "out")
    lines = [json.loads(line) for line in found["samples.jsonl"].splitlines()]
    assert [line["index"] for line in lines] == list(range(COUNT))
    assert [line["sample"] for line in lines] == [f"s{n:02d}" for n in range(COUNT)]


def test_memory_that_runs_out_in_one_process_halves_the_batches_of_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = run(plan(checkpoint, 1, batch_size=2), tmp_path / "halves")
    monkeypatch.setenv(AT, "scarce:13")
    one = run(plan(checkpoint, 1), tmp_path / "one")
    two = run(plan(checkpoint, 2), tmp_path / "two")
    assert two == one
    assert one["samples.jsonl"] == halves["samples.jsonl"]
    document = json.loads(one["reconstruct.json"])
    assert document["metrics"] == json.loads(halves["reconstruct.json"])["metrics"]
    (finding,) = [f for f in document["findings"] if f["id"] == "reconstruct.batch_halved"]
    assert finding["evidence"] == {"wanted": 4, "used": 2}


def test_the_types_of_weights_predictions_and_metrics_are_told(checkpoint: Path, tmp_path: Path) -> None:
    document = json.loads(run(plan(checkpoint, 1, dtype="bfloat16"), tmp_path / "out")["reconstruct.json"])
    policy = document["policy"]
    assert (policy["weights_and_inputs"], policy["predictions"]) == ("bfloat16", {"image": "float32"})
    assert (policy["metrics"], policy["tf32"]) == ("float64", False)


def test_an_autocast_that_stands_around_the_job_does_not_reach_the_model(checkpoint: Path, tmp_path: Path) -> None:
    plain = run(plan(checkpoint, 1), tmp_path / "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(plan(checkpoint, 1), tmp_path / "around") == plain


def test_what_the_adapter_raises_in_a_process_is_told_as_the_adapters(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AT, "raise:9")
    for processes in (1, 2):
        with pytest.raises(ReconstructError, match="predict failed: ValueError: the adapter's own mistake"):
            run(plan(checkpoint, processes), tmp_path / str(processes))
        document = json.loads((tmp_path / str(processes) / "reconstruct.json").read_text())
        assert [f["id"] for f in document["findings"]] == ["adapter.failed"]


def test_a_process_that_is_killed_is_missed_at_once_and_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AT, "kill:9")
    with pytest.raises(DeviceProcessError, match=r"the process on cpu process \d ended: signal 9"):
        run(plan(checkpoint, 2), tmp_path / "out")


def test_processes_that_are_silent_are_asked_for_their_stacks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(AT, "hang:0")
    monkeypatch.setattr(devices, "STACKS_AFTER_S", 0.5)
    asked: list[str] = []
    ask = devices._Worker.ask_for_stacks

    def ask_then_end(worker: Any) -> None:
        # By then it can answer: the signal's handler is the first thing that it has.
        time.sleep(1.0)
        ask(worker)
        asked.append(worker.name)
        if len(asked) == 2:
            time.sleep(1.0)
            raise KeyboardInterrupt

    monkeypatch.setattr(devices._Worker, "ask_for_stacks", ask_then_end)
    with pytest.raises(KeyboardInterrupt):
        run(plan(checkpoint, 2), tmp_path / "out")
    assert asked == ["cpu process 0", "cpu process 1"]
    assert capfd.readouterr().err.count("most recent call first") >= 2


def test_the_supervisors_question_for_stacks_reaches_every_process(checkpoint: Path, tmp_path: Path, log: Path) -> None:
    job = start_job(tmp_path, plan(checkpoint, 2, batch_size=12), 1, {AT: "hang:9"})
    try:
        _await_batches(log, 2)
        job.send_signal(signal.SIGUSR1)
        stacks = Path(NodeLayout(str(tmp_path)).attempt("20261101-000000-abcdef", 1).stacks_log)
        deadline = time.monotonic() + 30
        while "in predict" not in stacks.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        told = stacks.read_text()
    finally:
        job.kill()
        job.wait(20)
    # The job waits for its processes; the one that hangs does so in the adapter's predict.
    assert "in _await_some" in told
    assert "sharded_adapter.py" in told
    assert "in predict" in told


def test_processes_end_when_the_job_is_killed(checkpoint: Path, tmp_path: Path, log: Path) -> None:
    job = start_job(tmp_path, plan(checkpoint, 2), 1, {AT: "hang:9"})
    pids = _await_batches(log, 2)
    job.kill()
    job.wait(20)
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _is_alive(pid)]


@pytest.mark.parametrize(("processes", "sample"), [(1, 9), (2, 9), (1, 22)])
def test_an_attempt_goes_on_from_what_a_killed_one_left(
    checkpoint: Path, tmp_path: Path, log: Path, processes: int, sample: int
) -> None:
    whole = run(plan(checkpoint, 1), tmp_path / "whole")
    log.unlink()
    first = start_job(tmp_path, plan(checkpoint, processes), 1, {AT: f"kill:{sample}"})
    assert first.wait(60) != 0
    done = len(batches(log)) - 1 if log.exists() else 0
    log.unlink(missing_ok=True)
    second = start_job(tmp_path, plan(checkpoint, processes), 2, {})
    assert second.wait(60) == 0
    attempt = NodeLayout(str(tmp_path)).attempt("20261101-000000-abcdef", 2)
    out = Path(attempt.job_artifacts("reconstruct"))
    assert {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == whole
    assert not Path(attempt.job_scratch("reconstruct")).exists()
    again = len(batches(log)) if log.exists() else 0
    # A process that was killed may have had a result that it had not written yet; with one there is none.
    assert again <= 6 - done + (processes - 1)
    assert again >= 1


def test_a_damaged_result_and_one_of_another_key_are_computed_again(
    checkpoint: Path, tmp_path: Path, log: Path
) -> None:
    scratch = tmp_path / "scratch"
    whole = run(plan(checkpoint, 1), tmp_path / "whole", scratch=scratch)
    assert len(batches(log)) == 6
    log.unlink()
    kept = sorted(scratch.iterdir())
    damaged = bytearray(kept[2].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept[2].write_bytes(damaged)
    kept[4].write_bytes(kept[4].read_bytes()[:-100])
    assert run(plan(checkpoint, 1), tmp_path / "again", scratch, scratch=tmp_path / "second") == whole
    assert [first for _, _, first in batches(log)] == [8, 16]
    log.unlink()
    run(plan(checkpoint, 1, seed=1), tmp_path / "other", tmp_path / "second", scratch=tmp_path / "third")
    assert len(batches(log)) == 6


def test_data_that_changed_since_an_earlier_attempt_is_predicted_again(
    checkpoint: Path, tmp_path: Path, log: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_text("1")
    given = plan(checkpoint, 1, data={"images": str(data)})
    run(given, tmp_path / "one", scratch=tmp_path / "first")
    log.unlink()
    run(given, tmp_path / "same", tmp_path / "first", scratch=tmp_path / "second")
    assert not log.exists()
    (data / "a").write_text("22")
    run(given, tmp_path / "changed", tmp_path / "second", scratch=tmp_path / "third")
    assert len(batches(log)) == 6


@pytest.mark.parametrize(
    ("names", "count", "indices"),
    [(["H100", "H100"], 2, [0, 1]), (["H100", "H100"], 1, [0]), (["H100", "A100", "H100"], 3, [0, 2])],
)
def test_only_gpus_of_one_model_and_no_more_than_allowed_are_used(
    monkeypatch: pytest.MonkeyPatch, names: list[str], count: int, indices: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert [d.index for d in pick_devices("auto", count)] == indices


def test_by_hand_nothing_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    run(plan(checkpoint, 2), tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*"))


def start_job(root: Path, plan: NodePlan, attempt: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The job as the supervisor starts it, of attempt `attempt` below the node root `root`."""
    layout = NodeLayout(str(root))
    folder = Path(layout.attempt(plan.run_id, attempt).folder)
    folder.mkdir(parents=True)
    Path(layout.plan(plan.run_id)).write_text(json.dumps(to_json(plan)))
    command = [sys.executable, "-m", "remote_payload.jobs", "reconstruct", "--attempt", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(command, env=variables, cwd=REPOSITORY, stdin=subprocess.DEVNULL)


def _await_batches(log: Path, count: int) -> set[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and len({pid for pid, _, _ in batches(log)}) >= count:
            return {pid for pid, _, _ in batches(log)}
        time.sleep(0.05)
    raise AssertionError(f"no {count} processes evaluated anything")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_kept_result_that_is_lost_meanwhile_ends_the_run_and_drops_no_sample(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    run(plan(checkpoint, 1), tmp_path / "whole", scratch=scratch)
    read, seen = PredictionStore.read, []

    def read_once(store: PredictionStore, positions: Any) -> Any:
        again = tuple(positions) in seen
        seen.append(tuple(positions))
        return None if again else read(store, positions)

    monkeypatch.setattr(PredictionStore, "read", read_once)
    with pytest.raises(DeviceProcessError, match="no longer whole"):
        run(plan(checkpoint, 1), tmp_path / "again", scratch=scratch)
