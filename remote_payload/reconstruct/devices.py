"""The split over several devices: a process for each, the same batches, their results in the batches' order.

Threads would not do: what runs a model is Python, and one process runs one thread of it at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Callable, Optional

import torch

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.jobs import stacks
from remote_payload.reconstruct.loading import StructureError
from remote_payload.reconstruct.prediction import BatchResult, PredictionStore
from remote_payload.reconstruct.protocol import AdapterError
from remote_payload.reconstruct.runner import MemoryRanOutError
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.plan import NodePlan
from remote_payload.wire.results import Finding

BATCHES_AHEAD = 4
"""Of each device, before the oldest result has been taken."""
STACKS_AFTER_S = 300.0
"""Without a word from any process: then each writes its threads' stacks, once."""
_LEAVE_S = 10.0
_STANDARD_ERROR = 2
_PIPE_BYTES = 1 << 16
_START = (
    "import faulthandler, os, signal, sys; faulthandler.register(signal.SIGUSR1, int(sys.argv[1]), all_threads=True);"
    "os.write(int(sys.argv[2]), b'{\"listens\": true}\\n');"
    "import json; setup = json.loads(sys.stdin.buffer.readline()); sys.path[:] = setup['path'];"
    "from remote_payload.reconstruct.device_worker import main; sys.exit(main(setup))"
)

Told = Callable[[int, int], None]


class DeviceProcessError(RuntimeError):
    """A process ended, or failed in a way that is nobody's but its own."""


class DeviceProcesses:
    """One process for each device, each with the model loaded from the file. Leaving the context ends them all.

    `told(done, total)` hears of loading, over all processes.
    """

    def __init__(
        self, plan: NodePlan, devices: Sequence[torch.device], store: PredictionStore, told: Optional[Told] = None
    ) -> None:
        self._store = store
        self._told = told
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._loaded: dict[str, tuple[int, int]] = {}
        self._ordered = 0
        try:
            for number, device in enumerate(devices):
                worker = _Worker(plan, f"{device}" if device.type == "cuda" else f"cpu process {number}", device, store)
                self._workers.append(worker)
                self._selector.register(worker.answers, selectors.EVENT_READ, worker)
        except BaseException:
            self.close()
            raise

    def results(self, batches: Sequence[Sequence[int]]) -> Iterator[BatchResult]:
        """The results of these batches of positions, in their order.

        Raises as `BatchRunner.batch` does, and `DeviceProcessError` for a process that ended. What was ordered before
        and has not come is forgotten.
        """
        first = self._ordered
        done: set[int] = set()
        for taken, batch in enumerate(batches):
            while first + taken not in done:
                for worker in self._workers:
                    given = self._ordered - first
                    if worker.is_idle and given < len(batches) and given - taken < BATCHES_AHEAD * len(self._workers):
                        worker.give(self._ordered, batches[given])
                        self._ordered += 1
                done.update(self._await_some(first))
            result = self._store.read(batch)
            if result is None:
                raise DeviceProcessError(f"the result of the batch from {batch[0]} on is not what was written")
            yield result

    def _await_some(self, first: int) -> list[int]:
        """Orders, from `first` on, that came to be done, once something was heard."""
        begun, has_asked = time.monotonic(), False
        while True:
            ready = self._selector.select(1.0)
            done = []
            for key, _ in ready:
                taken = (self._take(key.data, message, first) for message in key.data.read())
                done += [order for order in taken if order is not None]
            if ready:
                return done
            if not has_asked and time.monotonic() - begun > STACKS_AFTER_S:
                has_asked = True
                for worker in self._workers:
                    worker.ask_for_stacks()

    def _take(self, worker: _Worker, message: Mapping[str, Any], first: int) -> Optional[int]:
        if "listens" in message:
            worker.listens()
            return None
        if "error" in message:
            raise _error_of(worker.name, message)
        if "loaded" in message:
            self._loaded[worker.name] = (int(message["loaded"]), int(message["total"]))
            if self._told is not None:
                every = self._loaded.values()
                self._told(sum(n for n, _ in every), max(t for _, t in every) * len(self._workers))
            return None
        worker.is_idle = True
        if int(message.get("ran_out", -1)) >= first:
            raise MemoryRanOutError(worker.samples)
        return int(message["done"]) if "done" in message else None

    def close(self) -> None:
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def __enter__(self) -> DeviceProcesses:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


class _Worker:
    """A process that evaluates batches on one device. It ends when its standard input does, as with our own death."""

    def __init__(self, plan: NodePlan, name: str, device: torch.device, store: PredictionStore) -> None:
        self.name = name
        self.is_idle = False
        self.samples = 0
        self.answers, writing = os.pipe()
        asked = stacks.descriptor()
        stacks_to = _STANDARD_ERROR if asked is None else asked
        self._pending = b""
        os.set_blocking(self.answers, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(stacks_to), str(writing)],
                stdin=subprocess.PIPE,
                pass_fds=(writing, stacks_to),
                bufsize=0,
            )
        except OSError:
            os.close(self.answers)
            raise
        finally:
            os.close(writing)
        setup = {
            "path": sys.path,
            "plan": to_json(plan),
            "device": str(device),
            "answers": writing,
            "store": str(store.folder),
            "key": store.key,
        }
        self._tell(setup)

    def give(self, order: int, positions: Sequence[int]) -> None:
        self.is_idle, self.samples = False, len(positions)
        self._tell({"order": order, "positions": list(positions)})

    def read(self) -> list[dict[str, Any]]:
        """Whole messages that have come. Raises `DeviceProcessError` at the end of the process."""
        try:
            data = os.read(self.answers, _PIPE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise DeviceProcessError(f"the process on {self.name} ended: {self._how()}")
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def listens(self) -> None:
        """It has its handler by now: asked for stacks earlier, it would die of the question."""
        stacks.pass_on_to(self._process.pid)

    def ask_for_stacks(self) -> None:
        if self._process.poll() is None:
            stacks.ask([self._process.pid])

    def dismiss(self) -> None:
        stacks.forget(self._process.pid)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self) -> None:
        """Wait until it has left, having been dismissed; kill it if it does not."""
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_LEAVE_S)
        os.close(self.answers)

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None:
            raise DeviceProcessError(f"the process on {self.name} takes no orders")
        # One that has ended is missed when its answers end.
        with contextlib.suppress(BrokenPipeError):
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]

    def _how(self) -> str:
        try:
            status = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "it closed its answers"
        return f"exit status {status}" if status >= 0 else f"signal {-status} (out of memory?)"


@dataclasses.dataclass(frozen=True)
class _Findings:
    findings: tuple[Finding, ...]


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error of a batch as a message from a process to us."""
    described: dict[str, Any] = {"error": str(error), "type": type(error).__name__}
    if isinstance(error, StructureError):
        described.update(kind="structure", findings=to_json(_Findings(error.findings)))
    elif isinstance(error, AdapterError):
        described["kind"] = "adapter"
    elif isinstance(error, CheckpointError):
        described["kind"] = "checkpoint"
    return described


def _error_of(name: str, message: Mapping[str, Any]) -> Exception:
    text, kind = str(message["error"]), message.get("kind")
    if kind == "structure":
        return StructureError(from_json(_Findings, message["findings"]).findings)
    if kind == "adapter":
        return AdapterError(text)
    if kind == "checkpoint":
        return CheckpointError(text)
    return DeviceProcessError(f"{message.get('type', 'an error')} on {name}: {text}")
