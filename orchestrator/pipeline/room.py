"""What may go from our folder on a node, and saying so where an upload found no room there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.errors import NoSpaceError, RemoteEvalError
from orchestrator.journal import Journal, fold
from orchestrator.node import Node
from remote_payload.wire.messages import KEEP_DAYS, GcReport, GcRequest
from remote_payload.wire.units import human_bytes


def gc_request(
    node: Node, journal: Journal, *, keep_days: float | None = None, keep_bytes: int | None = None, delete: bool = False
) -> GcRequest:
    """For `gc` of the node. Runs without a report here stay; None: the usual days, the profile's limit."""
    return GcRequest(
        node.layout.root,
        keep_days=KEEP_DAYS if keep_days is None else keep_days,
        keep_bytes=node.profile.store_limit_bytes if keep_bytes is None else keep_bytes,
        dry_run=not delete,
        pinned_runs=tuple(run for run in journal.run_ids() if not fold(journal.entries(run)).reported),
    )


@contextlib.contextmanager
def gc_offered(node: Node, journal: Journal, cluster: str) -> Iterator[None]:
    """Adds to a `NoSpaceError` what `remote-eval gc` would free."""
    try:
        yield
    except NoSpaceError as error:
        with contextlib.suppress(RemoteEvalError):
            request = gc_request(node, journal)
            freed = node.call("gc", request, GcReport).freed_bytes
            command = f"`remote-eval gc --cluster {cluster}{' --delete' if freed else ''}`"
            kept = f"nothing: it keeps runs for {request.keep_days:g} days unless `--keep-days` says less"
            error.action = f"{error.action} {command} would free {human_bytes(freed) if freed else kept}."
        raise
