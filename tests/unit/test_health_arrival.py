"""Health reads a file while it arrives: the same document as of the finished file, in whatever order its bytes come."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from remote_payload.checkpoint import read_header
from remote_payload.checkpoint.errors import BytesNotSentError
from remote_payload.health import scan
from remote_payload.health.job import examine
from remote_payload.jobs import rest
from remote_payload.jobs.context import JobContext
from remote_payload.jobs.rest import Rest, RestNeverCameError
from remote_payload.wire.codec import to_json
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.parts import ReadableSpans, added_lines
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy
from remote_payload.wire.states import Phase

DIGEST = "v1:" + "c" * 64
Span = tuple[int, int]


def trained_with_an_average() -> dict[str, Any]:
    """In the file the optimizer and the average stand in front of the weights; some tensors are no dense spans."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(5)])
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 200)).pow(2).mean().backward()
        optimizer.step()
    average = {name: value * 0.5 for name, value in model.state_dict().items()}
    average["0.bias"][3] = float("nan")
    strided = torch.randn(100, 100)[:, ::2]
    return {
        "optimizer_state_dict": optimizer.state_dict(),
        "ema_state_dict": average,
        "seen": strided,
        "model_state_dict": model.state_dict(),
    }


class Arriving:
    """A file of a node's store whose bytes come when `more` is called, those of `first` at once."""

    def __init__(self, folder: Path, content: bytes, first: Sequence[Span], others: Sequence[Span]) -> None:
        layout = NodeLayout(str(folder))
        self.path = Path(layout.checkpoint(DIGEST))
        self.part, self.readable = Path(layout.checkpoint_part(DIGEST)), Path(layout.checkpoint_readable(DIGEST))
        self.path.parent.mkdir(parents=True)
        self.content, self.left = content, [*first, *others]
        with self.part.open("wb") as file:
            file.truncate(len(content))
        head = ReadableSpans(self.part.stat().st_ino, len(content), ())
        self.readable.write_text(json.dumps(to_json(head)))
        for _ in first:
            self.more()

    def more(self, *_heard: object) -> None:
        """One span; after the last the file stands."""
        if not self.left:
            self.readable.unlink()
            self.part.rename(self.path)
            return
        begin, end = self.left.pop(0)
        with self.part.open("r+b") as file:
            file.seek(begin)
            file.write(self.content[begin:end])
        with self.readable.open("ab") as file:
            file.write(added_lines([(begin, end)]))


class NotingContext(JobContext):
    """Notes how many bytes were examined by the time that so many spans were to come."""

    def __init__(self, path: Path, out: Path) -> None:
        self.examined: list[tuple[int, int]] = []
        self.arriving: Arriving | None = None
        settings, gpu = EvaluationSettings(), GpuPolicy(device="cpu")
        plan = NodePlan("test", "", (JobSpec("health"),), str(path), settings, gpu, OverrunPolicy())
        super().__init__(plan, "health", out)

    def progress(self, phase: Phase, counter: int = 0, total: int | None = None, message: str = "") -> None:
        if message == "bytes examined" and self.arriving is not None:
            self.examined.append((counter, len(self.arriving.left)))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "_POLL_S", 0.0)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    torch.save(trained_with_an_average(), tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


def header_and_rest(path: Path, content: bytes, size: int = 20_000) -> tuple[list[Span], list[Span]]:
    """Spans of `size`: those that the header is read from, and the others."""
    reads: list[Span] = []
    path.write_bytes(content)
    read_header(path, on_read=lambda offset, length: reads.append((offset, offset + length)))
    spans = [(begin, min(begin + size, len(content))) for begin in range(0, len(content), size)]
    header = [s for s in spans if any(begin < s[1] and s[0] < end for begin, end in reads)]
    return header, [s for s in spans if s not in header]


def document_of(arriving: Arriving, context: NotingContext) -> str:
    context.arriving = arriving
    found = examine(str(arriving.path), "cpu", context, rest=Rest(str(arriving.path), arriving.more))
    return json.dumps(found)


@pytest.mark.parametrize("by_native", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_document_is_that_of_the_finished_file_whatever_came_first(
    tmp_path: Path, content: bytes, seed: int, by_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MIN_BYTES", 0 if by_native else 1 << 60)
    header, others = header_and_rest(tmp_path / "c.pt", content)
    random.Random(seed).shuffle(others)
    # Without all of the header's bytes it waits for the file.
    arriving = Arriving(
        tmp_path, content, header[: len(header) - seed // 3], header[len(header) - seed // 3 :] + others
    )
    context = NotingContext(tmp_path, tmp_path)
    found = document_of(arriving, context)
    assert arriving.path.read_bytes() == content
    assert found == json.dumps(examine(str(arriving.path), "cpu", NotingContext(arriving.path, tmp_path)))
    assert json.loads(found)["compiled_kernels"]["used"] is by_native
    assert json.loads(found)["joint"]


def test_what_is_complete_is_examined_while_the_rest_is_still_to_come(tmp_path: Path, content: bytes) -> None:
    header, others = header_and_rest(tmp_path / "c.pt", content)
    quarter = len(others) // 4
    weights_first = others[-quarter:] + others[:-quarter]
    arriving, context = Arriving(tmp_path, content, header, weights_first), NotingContext(tmp_path, tmp_path)
    document_of(arriving, context)
    assert any(counter > len(content) / 10 and left > len(others) / 2 for counter, left in context.examined)
    counters = [counter for counter, _ in context.examined]
    assert counters == sorted(counters)


def test_bytes_that_do_not_come_end_the_job_with_words(tmp_path: Path, content: bytes) -> None:
    header, others = header_and_rest(tmp_path / "c.pt", content)
    arriving, context = Arriving(tmp_path, content, header, others), NotingContext(tmp_path, tmp_path)
    context.arriving = arriving

    def more(*_heard: object) -> None:
        if len(arriving.left) > 3:
            arriving.more()

    with pytest.raises(RestNeverCameError, match="never came"):
        examine(str(arriving.path), "cpu", context, rest=Rest(str(arriving.path), more, limit_s=0.0))
    assert context.examined


def test_a_part_that_goes_ends_the_job_with_words(tmp_path: Path, content: bytes) -> None:
    header, others = header_and_rest(tmp_path / "c.pt", content)
    arriving, context = Arriving(tmp_path, content, header, others), NotingContext(tmp_path, tmp_path)

    def more(*_heard: object) -> None:
        if len(arriving.left) > 3:
            arriving.more()
        else:
            arriving.part.unlink(missing_ok=True)

    with pytest.raises(BytesNotSentError, match="did not arrive in full"):
        examine(str(arriving.path), "cpu", context, rest=Rest(str(arriving.path), more))


def test_a_damaged_record_is_found_as_in_the_finished_file(tmp_path: Path, content: bytes) -> None:
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    header, others = header_and_rest(tmp_path / "c.pt", content)
    arriving, context = Arriving(tmp_path, bytes(damaged), header, others), NotingContext(tmp_path, tmp_path)
    found = document_of(arriving, context)
    assert found == json.dumps(examine(str(arriving.path), "cpu", NotingContext(arriving.path, tmp_path)))
    assert json.loads(found)["verdict"]["dimensions"]["integrity"] == "fail"
