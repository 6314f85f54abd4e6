"""The process that `devices` starts for each device: takes batches from standard input, puts results into the store."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from remote_payload.checkpoint import read_header
from remote_payload.reconstruct.adapters import adapter_config, resolve_adapter
from remote_payload.reconstruct.devices import describe_error
from remote_payload.reconstruct.loading import choose_dtype, load_model
from remote_payload.reconstruct.prediction import PredictionStore
from remote_payload.reconstruct.runner import BatchRunner, MemoryRanOutError, make_deterministic
from remote_payload.reconstruct.split import declared_modalities, open_samples
from remote_payload.wire.codec import from_json
from remote_payload.wire.plan import NodePlan

Order = Optional[dict[str, Any]]


def main(setup: Mapping[str, Any]) -> int:
    """Exit status 0 when standard input has ended, 1 after an error, which is told before."""
    answers = int(setup["answers"])
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders,), name="orders", daemon=True).start()
    try:
        _work(setup, answers, orders)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: whatever it is, the job must hear of it
        traceback.print_exc()
        _tell(answers, describe_error(error))
        return 1
    return 0


def _work(setup: Mapping[str, Any], answers: int, orders: queue.SimpleQueue[Order]) -> None:
    plan = from_json(NodePlan, setup["plan"])
    settings = plan.settings
    device = torch.device(setup["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    make_deterministic(settings.seed)
    adapter = resolve_adapter(settings.adapter or "")
    header = read_header(plan.checkpoint_path)
    config = adapter_config(settings, header.config)
    dtype = choose_dtype(settings.dtype, header, device)
    loaded = load_model(
        adapter, config, header, device, dtype, lambda n, total: _tell(answers, {"loaded": n, "total": total})
    )
    modalities = declared_modalities(adapter, settings.data, config)
    samples = open_samples(adapter, settings.data, config)
    runner = BatchRunner(adapter, loaded.model, samples, modalities, device, dtype, settings.seed)
    store = PredictionStore(Path(setup["store"]), setup["key"])
    _tell(answers, {"ready": True})
    while (order := orders.get()) is not None:
        try:
            store.write(runner.batch(order["positions"]))
        except MemoryRanOutError:
            _tell(answers, {"ran_out": order["order"]})
        else:
            _tell(answers, {"done": order["order"]})


def _read_orders(orders: queue.SimpleQueue[Order]) -> None:
    """Until standard input ends: with it this process, whatever it is doing. Nobody would take its results."""
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)


def _tell(answers: int, message: Mapping[str, Any]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")
