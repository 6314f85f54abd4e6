"""Which runs need what lies in the store, by their attempts."""

from __future__ import annotations

import contextlib
import os

from remote_payload.agent import attempts
from remote_payload.agent.failure import AgentError
from remote_payload.wire.codec import WireError
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.names import check_run_id


def by_folder(layout: NodeLayout) -> dict[str, list[str]]:
    """Ids of the runs under way by the folder that their checkpoint lies in."""
    needed: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for run_id in sorted(os.listdir(layout.runs)):
            with contextlib.suppress(WireError):
                check_run_id(run_id)
                plan = attempts.read_plan(layout, run_id) if _is_under_way(layout, run_id) else None
                if plan is not None:
                    needed.setdefault(os.path.dirname(plan.checkpoint_path), []).append(run_id)
    return needed


def ended_since(layout: NodeLayout, run_id: str, at: float) -> bool:
    """Whether the run's last attempt ended after that time: then it needs no more what it used then."""
    try:
        last_words = [path for a in attempts.of_run(layout, check_run_id(run_id)) for path in (a.decision, a.status)]
    except WireError:
        return False
    return any(os.path.exists(path) and os.stat(path).st_mtime > at for path in last_words)


def _is_under_way(layout: NodeLayout, run_id: str) -> bool:
    """Whether an attempt may still start or run; one that cannot be read may."""
    try:
        return any(attempts.is_over(attempt) is not True for attempt in attempts.of_run(layout, run_id))
    except AgentError:
        return True
