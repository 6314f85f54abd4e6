"""collect: diagnostics first, then artifacts, each checked against the node's manifest, renamed into place."""

from __future__ import annotations

import functools
import json
import posixpath
import shutil
from pathlib import Path

from orchestrator.errors import IntegrityError
from orchestrator.fsutil import write_atomically
from orchestrator.journal import AttemptRecord
from orchestrator.node import BULK_BYTES
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.launch import read_status, reference
from orchestrator.transfer.carrier import Carrier
from orchestrator.transfer.download import Download, download_files
from orchestrator.transfer.fetch import fetch_file
from remote_payload.wire.codec import WireError, to_json
from remote_payload.wire.messages import FileList, ListRequest
from remote_payload.wire.names import printable
from remote_payload.wire.run_messages import Manifest, ManifestEntry


def collect(context: RunContext, attempt: AttemptRecord, *, is_final: bool) -> Manifest:
    """Bring everything of an attempt here, from a failed one too: logs, and small artifacts, over one stream each, then
    each large artifact over as many as pay.

    `is_final`: the attempt has ended, so what is collected now is all there will be. Raises `IntegrityError` for what
    does not verify.
    """
    _collect_diagnostics(context, attempt)
    manifest = context.node.call("manifest", reference(context, attempt), Manifest)
    _refuse_hostile_names(context, manifest)
    incoming = context.run.folder / f".artifacts-{attempt.number}"
    incoming.mkdir(mode=0o700, exist_ok=True)
    layout = context.node.layout.attempt(context.plan.run_id, attempt.number)
    wanted = [
        (posixpath.join(layout.artifacts, e.path), incoming.joinpath(*e.path.split("/")), e) for e in manifest.entries
    ]
    for _, target, _ in wanted:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    small = [Download(path, target, e.size, e.sha256) for path, target, e in wanted if e.size < BULK_BYTES]
    if small:
        download_files(
            context.node,
            small,
            on_progress=lambda progress: context.reporter.transfer("artifacts", progress),
            bandwidth_limit_bytes_per_s=context.profile.bandwidth_limit_bytes_per_s,
        )
    large = [(path, target, entry) for path, target, entry in wanted if entry.size >= BULK_BYTES]
    limit = context.profile.bandwidth_limit_bytes_per_s
    with Carrier(context.node, bandwidth_limit_bytes_per_s=limit, packing=False) as carrier:
        carrier.expect(sum(entry.size for _, _, entry in large))
        for path, target, entry in large:
            _fetch_large(context, carrier, path, target, entry)
    _replace_folder(incoming, context.run.artifacts)
    write_atomically(context.run.manifest, (json.dumps(to_json(manifest), indent=1, sort_keys=True) + "\n").encode())
    if is_final:
        context.note_entry("collected", attempt=attempt.number, complete=manifest.complete, files=len(wanted))
    return manifest


def _fetch_large(context: RunContext, carrier: Carrier, path: str, target: Path, entry: ManifestEntry) -> None:
    """One artifact over several streams, gone on with where an earlier client was killed."""
    listed = context.node.call("list_files", ListRequest(context.node.root, path), FileList)
    if listed.is_folder or [file.size for file in listed.files] != [entry.size]:
        raise IntegrityError(
            f"{printable(entry.path)} has not the {entry.size} bytes that the node's manifest says",
            action="It changed after the manifest was written: look at it there.",
        )
    fetch_file(
        carrier,
        path,
        listed.files[0],
        target,
        overwrite=True,
        sha256=entry.sha256,
        packing=context.profile.pack_floats,
        on_progress=functools.partial(context.reporter.transfer, printable(entry.path)),
    )


def _collect_diagnostics(context: RunContext, attempt: AttemptRecord) -> None:
    """Those that exist: a job that never ran has no logs."""
    context.run.diagnostics.mkdir(mode=0o700, exist_ok=True)
    layout = context.node.layout.attempt(context.plan.run_id, attempt.number)
    sizes = read_status(context, attempt).sizes
    wanted = []
    for path in layout.diagnostics:
        target = context.run.diagnostics / posixpath.basename(path)
        target.unlink(missing_ok=True)
        if target.name in sizes:
            wanted.append(Download(path, target, may_grow=True))
    if wanted:
        download_files(context.node, wanted)


def _refuse_hostile_names(context: RunContext, manifest: Manifest) -> None:
    seen = set()
    for entry in manifest.entries:
        try:
            context.run.artifact(entry.path)
        except WireError as error:
            raise IntegrityError(
                f"the node's manifest names a path that could lead elsewhere: {error}",
                action="Do not trust this node; tell its administrator.",
            ) from error
        if entry.path.lower() in seen:
            raise IntegrityError(f"the node's manifest names {entry.path!r} twice")
        seen.add(entry.path.lower())


def _replace_folder(incoming: Path, final: Path) -> None:
    """Rename `incoming` to `final`; an older attempt's folder steps aside first and goes away last."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    incoming.replace(final)
    shutil.rmtree(old, ignore_errors=True)
