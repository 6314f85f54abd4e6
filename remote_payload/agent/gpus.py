"""Which GPUs there are, which a run may take, and the advisory leases among our own runs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

from remote_payload.agent.commands import ask
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import GpuPolicy
from remote_payload.wire.run_messages import Gpu

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
_ASK_LIMIT_S = 20.0
_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """One GPU as nvidia-smi tells it. `process_ids` are all that compute there, whoever's they are."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    driver_version: str
    process_ids: tuple[int, ...] = ()

    def as_message(self) -> Gpu:
        return Gpu(self.index, self.name, self.total_bytes, self.free_bytes, len(self.process_ids))


@dataclasses.dataclass(frozen=True)
class GpuChoice:
    """What a run's jobs get. `visible` None leaves the environment alone; `refusal`: why a needed GPU is missing."""

    visible: Optional[str]
    chosen: tuple[GpuFacts, ...] = ()
    reason: str = ""
    refusal: str = ""


def find_gpus() -> tuple[GpuFacts, ...]:
    """Ask nvidia-smi, for a bounded time. Empty where there is no NVIDIA driver, or none that answers."""
    devices = ask(
        [
            "nvidia-smi",
            "--query-gpu=index,uuid,name,memory.total,memory.free,driver_version",
            "--format=csv,noheader,nounits",
        ],
        _ASK_LIMIT_S,
    )
    if devices is None:
        return ()
    processes = ask(["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits"], _ASK_LIMIT_S)
    return parse_gpus(devices, processes or "")


def parse_gpus(devices: str, processes: str) -> tuple[GpuFacts, ...]:
    """GPUs from the two CSV answers of nvidia-smi; lines of another form are ignored."""
    at_work: dict[str, list[int]] = {}
    for row in csv.reader(processes.splitlines(), skipinitialspace=True):
        if len(row) == 2 and row[1].strip().isdigit():
            at_work.setdefault(row[0].strip(), []).append(int(row[1]))
    found = []
    for row in csv.reader(devices.splitlines(), skipinitialspace=True):
        cells = [cell.strip() for cell in row]
        if len(cells) == 6 and cells[0].isdigit() and cells[3].isdigit() and cells[4].isdigit():
            uuid = cells[1]
            memory = int(cells[3]) * _MIB, int(cells[4]) * _MIB
            found.append(GpuFacts(int(cells[0]), uuid, cells[2], *memory, cells[5], tuple(at_work.get(uuid, ()))))
    return tuple(found)


def allowed_by_environment(gpus: Iterable[GpuFacts], visible: Optional[str]) -> tuple[GpuFacts, ...]:
    """Those that an inherited CUDA_VISIBLE_DEVICES leaves (a scheduler's allocation); indices and UUIDs are known."""
    if visible is None:
        return tuple(gpus)
    wanted = [word.strip() for word in visible.split(",") if word.strip()]
    return tuple(
        gpu
        for gpu in gpus
        if any(word == str(gpu.index) or (word.startswith("GPU-") and gpu.uuid.startswith(word)) for word in wanted)
    )


def unfit_reason(gpu: GpuFacts, policy: GpuPolicy) -> str:
    """Why the policy does not take this GPU as it is now; empty if it does."""
    if gpu.free_bytes < policy.min_free_bytes:
        return f"{gpu.free_bytes / 1024**3:.1f} GiB free of the {policy.min_free_bytes / 1024**3:.1f} GiB wanted"
    if gpu.process_ids and not policy.allow_shared:
        return f"{len(gpu.process_ids)} other process{'es' if len(gpu.process_ids) > 1 else ''}"
    return ""


def in_order_of_preference(gpus: Iterable[GpuFacts], policy: GpuPolicy) -> list[GpuFacts]:
    """Those the policy takes: fewest processes first, then most free memory, then the index."""
    fit = [gpu for gpu in gpus if not unfit_reason(gpu, policy)]
    return sorted(fit, key=lambda gpu: (len(gpu.process_ids), -gpu.free_bytes, gpu.index))


class GpuLeases:
    """Advisory locks on GPUs, one file each. They end with the last process that holds them open."""

    def __init__(self, layout: NodeLayout) -> None:
        self._layout = layout
        self._held: dict[str, int] = {}

    @property
    def descriptors(self) -> tuple[int, ...]:
        """To be kept open by the jobs, so that a job that outlives its supervisor keeps its GPU."""
        return tuple(self._held.values())

    def take(self, gpu: GpuFacts) -> bool:
        """True if no other run of ours holds this GPU."""
        os.makedirs(self._layout.leases, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._layout.gpu_lease(gpu.uuid), flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._held[gpu.uuid] = descriptor
        return True

    def release(self) -> None:
        for descriptor in self._held.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._held.clear()


def choose(policy: GpuPolicy, gpus: Sequence[GpuFacts], leases: GpuLeases, environment: Mapping[str, str]) -> GpuChoice:
    """Take leases on up to `policy.count` GPUs. With `auto` a run that gets none uses the CPU, and says why."""
    if policy.device == "cpu" or policy.count < 1:
        return GpuChoice("", reason="the policy asks for the CPU")
    candidates = allowed_by_environment(gpus, environment.get(VISIBLE_VARIABLE))
    chosen: list[GpuFacts] = []
    leased: set[str] = set()
    for gpu in in_order_of_preference(candidates, policy):
        if len(chosen) == policy.count:
            break
        if leases.take(gpu):
            chosen.append(gpu)
        else:
            leased.add(gpu.uuid)
    if chosen and (len(chosen) == policy.count or policy.device == "auto"):
        return GpuChoice(",".join(gpu.uuid for gpu in chosen), tuple(chosen), f"{len(chosen)} of {policy.count} wanted")
    leases.release()
    reason = _why_none(candidates, leased, policy)
    if not gpus:
        # Without nvidia-smi we know nothing of the GPUs here, and CUDA itself may still find one.
        return GpuChoice(None, reason=reason)
    if policy.device == "auto":
        return GpuChoice("", reason=reason)
    return GpuChoice(None, reason=reason, refusal=f"{len(chosen)} of {policy.count} GPUs could be taken: {reason}")


def _why_none(candidates: Sequence[GpuFacts], leased: set[str], policy: GpuPolicy) -> str:
    if not candidates:
        return "nvidia-smi shows no GPU that this login may use"
    reasons = [
        f"GPU {gpu.index}: {'leased by another run' if gpu.uuid in leased else unfit_reason(gpu, policy) or 'fit'}"
        for gpu in candidates
    ]
    return "; ".join(reasons)
