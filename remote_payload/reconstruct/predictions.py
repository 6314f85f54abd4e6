"""All batches of a run, in their order: from this process or from one a device, or left by an earlier attempt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

import torch

from remote_payload.checkpoint import CheckpointHeader
from remote_payload.jobs.context import JobContext
from remote_payload.reconstruct.devices import DeviceProcesses
from remote_payload.reconstruct.loading import FittedModel, fill_model
from remote_payload.reconstruct.prediction import BatchResult, PredictionStore
from remote_payload.reconstruct.protocol import Adapter, Modality, Sample
from remote_payload.reconstruct.runner import BatchRunner, cut
from remote_payload.wire.codec import to_json
from remote_payload.wire.states import Phase


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


def predict_batches(
    context: JobContext,
    adapter: Adapter,
    fitted: FittedModel,
    header: CheckpointHeader,
    devices: Sequence[torch.device],
    samples: Sequence[Sample],
    positions: Sequence[int],
    modalities: Sequence[Modality],
    store: Optional[PredictionStore],
) -> Iterator[BatchResult]:
    """Results in the order of the positions; the same ones on however many devices and after however many attempts.

    Raises as `fill_model` and `BatchRunner.batch` do, `DeviceProcessError`.
    """
    settings = context.plan.settings
    batches = dict(enumerate(cut(positions, settings.batch_size)))
    missing = {n: b for n, b in batches.items() if store is None or store.read(n, b) is None}

    def told(done: int, total: int) -> None:
        context.progress(Phase.LOAD, done, total, "weights")

    new: Iterator[BatchResult]
    with contextlib.ExitStack() as stack:
        if len(devices) > 1 and len(missing) > 1 and store is not None:
            processes = DeviceProcesses(context.plan, devices[: len(missing)], store, told)
            new = stack.enter_context(processes).results(missing)
        elif missing:
            model = fill_model(fitted, adapter, header, devices[0], told)
            runner = BatchRunner(
                adapter,
                model,
                samples,
                modalities,
                devices[0],
                fitted.dtype,
                settings.batch_size,
                settings.seed,
            )
            new = (_kept(store, n, runner.batch(b)) for n, b in missing.items())
        else:
            new = iter(())
        for number, batch in batches.items():
            if number in missing:
                yield next(new)
            elif store is not None and (result := store.read(number, batch)) is not None:
                yield result


def _kept(store: Optional[PredictionStore], number: int, result: BatchResult) -> BatchResult:
    if store is not None:
        # A disk that is full is no reason to stop: only a later attempt would have gone on from it.
        with contextlib.suppress(OSError):
            store.write(number, result)
    return result


def _key(context: JobContext, header: CheckpointHeader, device: torch.device) -> str:
    """Everything that decides a prediction, as far as it is known: of another key nothing is taken over."""
    plan = context.plan
    parts = {
        "plan_key": plan.plan_key,
        "payload": plan.payload_sha256,
        "checkpoint": [plan.checkpoint_digest, list(header.fingerprint)],
        "settings": to_json(plan.settings),
        "code": to_json(plan.code) if plan.code is not None else None,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
