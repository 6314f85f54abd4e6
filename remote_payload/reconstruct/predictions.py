"""All batches of a run, in their order: from this process or from one a device, or left by an earlier attempt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import numpy as np
import torch

from remote_payload.checkpoint import CheckpointHeader
from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct.devices import DeviceProcessError, DeviceProcesses
from remote_payload.reconstruct.loading import FittedModel, fill_model
from remote_payload.reconstruct.prediction import BatchResult, PredictionStore
from remote_payload.reconstruct.protocol import Adapter, Modality, Sample
from remote_payload.reconstruct.runner import BatchRunner, cut
from remote_payload.wire.codec import to_json
from remote_payload.wire.states import Phase

_MOST_FILES = 100_000


@contextlib.contextmanager
def prediction_store(
    context: JobContext, header: CheckpointHeader, devices: Sequence[torch.device]
) -> Iterator[Optional[PredictionStore]]:
    """Where results lie while the evaluation goes on; in a run until its job has ended well, for its next attempt.

    None where nothing needs one: by hand, on one device. A run by hand has no key of its code, so it keeps nothing.
    """
    if context.scratch is not None:
        store = PredictionStore(context.scratch, _key(context, header, devices[0]))
        store.adopt(context.earlier_scratch)
        yield store
    elif len(devices) > 1:
        with tempfile.TemporaryDirectory(dir=context.artifacts, prefix=".predictions-") as folder:
            yield PredictionStore(Path(folder), "")
    else:
        yield None


class Predictions:
    """The model's outputs for a split, on however many devices and after however many attempts the same ones.

    The model is loaded when the first batch is asked for that no earlier attempt left. Leaving the context ends the
    processes of several devices.
    """

    def __init__(
        self,
        context: JobContext,
        adapter: Adapter,
        fitted: FittedModel,
        header: CheckpointHeader,
        devices: Sequence[torch.device],
        samples: Sequence[Sample],
        positions: Sequence[int],
        modalities: Sequence[Modality],
        store: Optional[PredictionStore],
    ) -> None:
        self._context, self._adapter, self._fitted, self._header = context, adapter, fitted, header
        self._devices, self._samples, self._positions, self._modalities = devices, samples, positions, modalities
        self._store = store
        self._runner: Optional[BatchRunner] = None
        self._processes: Optional[DeviceProcesses] = None

    def results(self, batch_size: int) -> Iterator[BatchResult]:
        """Results in the order of the positions, cut into batches of this size.

        Raises as `fill_model` and `BatchRunner.batch` do, `DeviceProcessError`. After a `MemoryRanOutError` it may be
        called again with another size.
        """
        batches = cut(self._positions, batch_size)
        missing = [batch for batch in batches if self._store is None or self._store.read(batch) is None]
        left = len(batches) - len(missing)
        if left:
            self._context.progress(Phase.LOAD, message=f"{left} of {len(batches)} batches were predicted before")
        new = self._computed(missing)
        awaited = set(missing)
        for batch in batches:
            if batch in awaited:
                yield next(new)
                continue
            result = None if self._store is None else self._store.read(batch)
            if result is None:
                raise DeviceProcessError(f"the kept result of the batch at sample {batch[0]} is no longer whole")
            yield result

    def _computed(self, missing: Sequence[tuple[int, ...]]) -> Iterator[BatchResult]:
        if not missing:
            return iter(())
        if len(self._devices) > 1 and self._store is not None and (self._processes is not None or len(missing) > 1):
            if self._processes is None:
                devices = self._devices[: len(missing)]
                self._processes = DeviceProcesses(self._context.plan, devices, self._store, self._told)
            return self._processes.results(missing)
        if self._runner is None:
            settings, device = self._context.plan.settings, self._devices[0]
            model = fill_model(self._fitted, self._adapter, self._header, device, self._told)
            self._runner = BatchRunner(
                self._adapter, model, self._samples, self._modalities, device, self._fitted.dtype, settings.seed
            )
        runner = self._runner
        return (_kept(self._store, runner.batch(batch)) for batch in missing)

    def _told(self, done: int, total: int) -> None:
        self._context.progress(Phase.LOAD, done, total, "weights")

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if self._processes is not None:
            self._processes.close()


def _kept(store: Optional[PredictionStore], result: BatchResult) -> BatchResult:
    if store is not None:
        # A disk that is full is no reason to stop: only a later attempt would have gone on from it.
        with contextlib.suppress(OSError):
            store.write(result)
    return result


def _file_facts(path: str) -> list[list[Any]]:
    """[name, size, time of change] of a file, or of what is in a folder: as many as a look may take."""
    found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    facts = []
    for file in sorted(found)[:_MOST_FILES]:
        with contextlib.suppress(OSError):
            seen = os.stat(file)
            facts.append([os.path.relpath(file, path), seen.st_size, seen.st_mtime_ns])
    return facts


def _cpu_facts() -> list[Any]:
    """What decides the order in which a CPU adds."""
    return ["cpu", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _key(context: JobContext, header: CheckpointHeader, device: torch.device) -> str:
    """Everything that decides a prediction, as far as it is known: of another key nothing is taken over."""
    plan = context.plan
    parts = {
        "plan_key": plan.plan_key,
        "payload": plan.payload_sha256,
        "checkpoint": [plan.checkpoint_digest, list(header.fingerprint)],
        "settings": to_json(plan.settings),
        "code": to_json(plan.code) if plan.code is not None else None,
        "data": {name: _file_facts(path) for name, path in plan.settings.data.items()},
        "versions": [str(torch.__version__), np.__version__],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_facts(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
