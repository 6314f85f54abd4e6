"""Whether what a run evaluates is still what was found under its digest: looked at before each job and after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Callable, Optional

from remote_payload.agent.stored_chunks import StoredChunks
from remote_payload.agent.verified import FileState
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import NodePlan

_AGAIN = "run it again, and it is found or sent anew"


class Unchanged:
    """The checkpoint of a plan that knows its digest. `tell` is called while what was only touched is read in full."""

    def __init__(self, layout: NodeLayout, plan: NodePlan, tell: Callable[[], None]) -> None:
        self._layout, self._tell = layout, tell
        self._path, self._digest = plan.checkpoint_path, plan.checkpoint_digest
        self._fingerprint = plan.checkpoint_fingerprint
        self._before: Optional[Sequence[Optional[FileState]]] = None

    def problem(self) -> str:
        """Why no job may speak of the checkpoint, in words; empty where nothing is wrong, or nothing stands there: a
        job that needs it meets that itself."""
        if self._digest is None or not os.path.lexists(self._path):
            return ""
        if self._path not in (self._layout.checkpoint(self._digest), self._layout.checkpoint_tree(self._digest)):
            return self._problem_in_place()
        stored = StoredChunks(self._layout, self._digest)
        if not (stored.is_believed or stored.verify(self._tell)):
            return f"the stored copy of the checkpoint was changed since it was verified: {_AGAIN}"
        before, self._before = self._before, stored.states
        if before is not None and [*map(_content, before)] != [*map(_content, self._before)]:
            return f"the stored copy of the checkpoint was replaced while a job read it: {_AGAIN}"
        return ""

    def _problem_in_place(self) -> str:
        try:
            facts = os.stat(self._path)
        except OSError:
            return ""
        now = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
        if len(self._fingerprint) != len(now) or tuple(self._fingerprint) == now:
            return ""
        return f"the checkpoint was changed since the run found it under its digest: {_AGAIN}"


def _content(state: Optional[FileState]) -> Optional[FileState]:
    """But for the time at which it got or lost a name: what was read in full since then is what it was."""
    return state._replace(ctime_ns=0) if state is not None else None
