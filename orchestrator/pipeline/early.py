"""How much of a checkpoint goes before a job begins, and what may follow while one runs. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import IntegrityError
from orchestrator.plan import RunPlan
from orchestrator.transfer.order import ChunkClass, classify, sending_order, tensor_bytes
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.units import human_bytes

EARLY_START_BYTES = 64 * 1024 * 1024
"""So much must be to come for an attempt to begin without it."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The chunks that go for now, in their order (None: all, as they stand in the file), and why no more, in words."""

    order: list[int] | None
    note: str = ""


def chunk_classes(
    inspected: Mapping[str, Any], path: str, spans: Sequence[tuple[int, int]], facts: tuple[int, int, int] | None
) -> list[ChunkClass] | None:
    """What each of a file's chunks holds; None where the header that was `inspected` is not that of the file at `path`
    alone, with these `facts`, its size, mtime_ns and inode, where they are known."""
    header = inspected["header"]
    if [file["path"] for file in header["files"]] != [path] or facts not in (None, tuple(header["fingerprint"])):
        return None
    return classify(spans, tensor_bytes(header, inspected["reads"]))


def first_share(
    plan: RunPlan, manifest: ChunkManifest, classes: list[ChunkClass] | None, *, may_start_early: bool
) -> Share:
    """What jobs read first before the rest; no rest where nobody needs it, or not yet."""
    if classes is None:
        return Share(None)
    order = sending_order(classes)
    lengths = [chunk.length for chunk in manifest.chunks]
    behind = {last: sum(n for n, kind in zip(lengths, classes, strict=True) if kind > last) for last in ChunkClass}
    suffices = what_suffices(plan, behind, may_start_early=may_start_early)
    if suffices is None:
        return Share(order)
    last, why = suffices
    shares = f"{human_bytes(manifest.size - behind[last])} of {human_bytes(manifest.size)}"
    note = f"only the {'header is' if last is ChunkClass.HEADER else 'weights are'} sent ({shares}): {why}"
    return Share([index for index in order if classes[index] <= last], note)


def what_suffices(
    plan: RunPlan, behind_bytes: Mapping[ChunkClass, int], *, may_start_early: bool
) -> tuple[ChunkClass, str] | None:
    """The last class of chunks that is sent before a job begins, and why no more, in words; None where all are."""
    are_content = [job.reads_weights_only for job in plan.jobs]
    if behind_bytes[ChunkClass.WEIGHTS] and all(are_content):
        return ChunkClass.WEIGHTS, "reconstruct needs no more"
    # A digest that is remembered may turn out to be another content's, which must not happen under a running job.
    if not may_start_early:
        return None
    late = [job for job in plan.jobs if not (job.reads_weights_only or job.begins_without_rest(plan.settings))]
    if late and plan.cluster_profile().gpu.device == "cuda":
        # A GPU is not held while bytes are waited for, and one that is let go may be another's when they have come.
        return None
    if any(are_content) and plan.settings.adapter:
        first = ChunkClass.WEIGHTS, "reconstruct begins, and the rest follows"
    elif any(job.begins_without_rest(plan.settings) for job in plan.jobs):
        first = ChunkClass.HEADER, "health begins, and reads the rest as it comes"
    else:
        return None
    return first if behind_bytes[first[0]] >= EARLY_START_BYTES else None


def changed_since_begun(plan: RunPlan, what: str) -> IntegrityError:
    """For a checkpoint that is not what an attempt began with."""
    return IntegrityError(
        f"{what} changed after its weights were sent",
        action=f"`remote-eval cancel {plan.run_id}`, and start a new run for what the file is now.",
    )
