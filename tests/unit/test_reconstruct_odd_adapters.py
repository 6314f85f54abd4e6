"""Adapters that give back what nobody expects: the preflight tells it as a finding and never falls over itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remote_payload.checkpoint import read_header
from remote_payload.reconstruct.preflight import check
from remote_payload.wire.results import Severity
from tests.unit.test_reconstruct_job import Tiny, make_plan


class NothingPredicted(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        return None


class NoModalities(Tiny):
    def modalities(self, data: Any, config: Any) -> Any:
        return None


class NoSequence(Tiny):
    def samples(self, split: Any, data: Any, config: Any) -> Any:
        return 7


class NoSamples(Tiny):
    def samples(self, split: Any, data: Any, config: Any) -> Any:
        return ["text", "text"]


class NoModule(Tiny):
    def build_model(self, config: Any) -> Any:
        return {"weight": 1}


class NoMapping(Tiny):
    def map_state_dict(self, names: Any) -> Any:
        return 3


class TextPredicted(Tiny):
    def predict(self, model: Any, batch: Any) -> Any:
        return dict.fromkeys((m.name for m in self.modalities({}, None)), "text")  # type: ignore[arg-type]


class OddNames(Tiny):
    data_names: Any = 5


ODD = (NothingPredicted, NoModalities, NoSequence, NoSamples, NoModule, NoMapping, TextPredicted, OddNames)


@pytest.mark.parametrize("adapter", ODD)
def test_what_cannot_be_used_is_a_finding_of_the_adapter(tmp_path: Path, adapter: type) -> None:
    torch.save({"model": nn.Linear(8, 8).state_dict()}, tmp_path / "tiny.pt")
    plan = make_plan(tmp_path / "tiny.pt", adapter=f"{adapter.__module__}:{adapter.__name__}")
    found = check(plan, read_header(plan.checkpoint_path))
    errors = [f for f in found if f.severity is Severity.ERROR]
    assert errors
    assert all(f.title and "\n" not in f.title for f in errors)
    assert {f.id.split(".")[0] for f in errors} <= {"adapter", "structure"}
