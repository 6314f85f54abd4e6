"""The health job: header, one streaming pass, checks, `health.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Optional

from remote_payload.checkpoint.errors import BytesNotSentError, CheckpointError, MissingCheckpointError
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.reader import read_header
from remote_payload.checkpoint.source import fingerprint_of
from remote_payload.health.checks import ALL_CHECKS
from remote_payload.health.document import health_document, unreadable_document
from remote_payload.health.facts import HealthFacts
from remote_payload.health.verdict import run_checks
from remote_payload.jobs.context import JobContext
from remote_payload.jobs.rest import Rest
from remote_payload.wire.states import Phase
from remote_payload.wire.units import human_bytes


def run(context: JobContext) -> None:
    """Write `health.json` for the plan's checkpoint, whatever state it is in.

    It may still be on its way. Raises `MissingCheckpointError` if nothing is there: that is no verdict on a file, and
    `RestNeverCameError`.
    """
    plan = context.plan
    passes = plan.settings.health_passes
    rest = Rest(plan.checkpoint_path, lambda waited_s, words: context.progress(Phase.RUN, waited_s, message=words))
    # The supervisor gives no GPU to a job that only waits for bytes, whatever the plan says.
    device = "cpu" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else plan.gpu.device
    context.write_results(examine(plan.checkpoint_path, device, context, passes=passes, rest=rest))


def examine(
    path: str,
    device: str,
    context: JobContext,
    against: Optional[str] = None,
    passes: Sequence[str] = (),
    rest: Optional[Rest] = None,
) -> dict[str, Any]:
    """The document for one checkpoint. `device` is auto, cpu or cuda; `against` an earlier checkpoint to compare with.

    `passes`: further ones over the weight matrices, of `HEALTH_PASSES`. With `rest` a file is read as it arrives, and
    the document is that of the file when it stands.
    Raises `CheckpointError` if the earlier one cannot be read: it is not the file under examination.
    """
    is_arriving = rest is not None and rest.is_awaited()
    context.progress(Phase.LOAD, message="reading the header")
    earlier = None if against is None else read_header(against)
    try:
        header = _read_header(path, rest)
    except MissingCheckpointError:
        raise
    except CheckpointError as error:
        return unreadable_document(error)
    context.progress(Phase.IMPORT, message="importing torch")
    from remote_payload.health import scan
    from remote_payload.health.device import choose_device
    from remote_payload.health.drift import measure_drift

    context.progress(Phase.CUDA, message="choosing the device")
    chosen = choose_device(device)

    def report(done: int, total: int) -> None:
        if rest is not None:
            rest.beside = f", {human_bytes(done)} examined"
        context.progress(Phase.RUN, counter=done, total=total, message="bytes examined")

    def report_drift(done: int, total: int) -> None:
        context.progress(Phase.RUN, counter=done, total=total, message="tensors compared with the earlier checkpoint")

    def report_spectra(done: int, total: int) -> None:
        context.progress(Phase.RUN, counter=done, total=total, message="spectra of weight matrices")

    try:
        result = scan.scan(header, chosen, report, await_more=rest.await_more if rest and is_arriving else None)
    except CheckpointError as error:
        # The file went away between the header and the pass.
        return unreadable_document(error)
    if is_arriving:
        header = _as_it_stands(header)
    drift = None if earlier is None else measure_drift(header, earlier, report_drift)
    found = None
    if passes:
        from remote_payload.health.spectra import measure_spectra

        found = measure_spectra(header, result, passes, chosen, context.plan.settings.seed, report_spectra)
    facts = HealthFacts(header, result, _change(header), drift, found)
    findings, verdict = run_checks(facts, ALL_CHECKS)
    return health_document(facts, findings, verdict, chosen)


def _read_header(path: str, rest: Optional[Rest]) -> CheckpointHeader:
    """Its bytes are the first that are sent; where not all of them were, it waits for the file."""
    try:
        return read_header(path)
    except BytesNotSentError:
        if rest is None:
            raise
        rest.wait()
        return read_header(path)


def _as_it_stands(header: CheckpointHeader) -> CheckpointHeader:
    """While a file arrives its time changes all the while."""
    now = fingerprint_of(header.path)
    return header if now is None else dataclasses.replace(header, fingerprint=(now.size, now.mtime_ns, now.inode))


def _change(header: CheckpointHeader) -> Optional[str]:
    now = fingerprint_of(header.path)
    if now is None:
        return "the file is gone"
    for label, before, after in zip(
        ("size", "modification time", "inode"), header.fingerprint, (now.size, now.mtime_ns, now.inode)
    ):
        if before != after:
            return f"its {label} went from {before} to {after}"
    return None
