"""Parts of files whose digest was not known yet when they began to arrive, under another one that stands for it.

In the store a draft is a part like any other that broke off, so nothing but room for it needs to know of drafts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from typing import Callable, Optional

from remote_payload.agent import files, store
from remote_payload.agent.channel import PeerGoneError
from remote_payload.agent.failure import AgentError
from remote_payload.agent.locks import SessionLock
from remote_payload.wire.layout import NodeLayout

_GATHER_S = 0.05
"""Chunks that are named within it are copied together: manifests are read anew each time."""


def adopt(layout: NodeLayout, draft: str, digest: Optional[str], session: str) -> bool:
    """Make what arrived as `draft` the part of `digest`, whose folder the caller holds; None: it is of no use. True
    where the draft is gone now. It stays where somebody still sends it, and where there is a part already: then its
    chunks may be copied from it."""
    if draft == digest or not os.path.isdir(layout.checkpoint_folder(draft)):
        return False
    if digest is not None and os.path.lexists(layout.checkpoint_part(digest)):
        return False
    lock = SessionLock(layout.checkpoint_lock(draft), session)
    try:
        if not lock.try_exclusive():
            return False
        if digest is not None:
            # The journal first: one without its part is begun anew, and so is a part without its journal.
            for path_of in (layout.checkpoint_journal, layout.checkpoint_part):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path_of(draft), path_of(digest))
            files.fsync_folder(layout.checkpoint_folder(digest))
        doomed = store.move_away(layout, layout.checkpoint_folder(draft))
    finally:
        lock.close()
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def discard(layout: NodeLayout, draft: str, session: str) -> bool:
    """Delete the draft, unless other streams still hold it: the last one to leave does. True where it is gone now."""
    return adopt(layout, draft, None, session)


class Copier:
    """Has chunks copied that are named one after the other, in a thread, beside what arrives.

    `copy_chunks` gets all that were named meanwhile, and begins no other once its second argument says no. What it
    could not copy is left to the upload proper: `tell` hears how many chunks are done with either way.
    """

    def __init__(
        self, copy_chunks: Callable[[Sequence[int], Callable[[], bool]], None], tell: Callable[[int], None]
    ) -> None:
        self._copy_chunks = copy_chunks
        self._tell = tell
        self._state = threading.Condition()
        self._named: list[int] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="copier")
        self._thread.start()

    def copy(self, index: int) -> None:
        with self._state:
            self._named.append(index)
            self._state.notify()

    def stop(self) -> None:
        """Begin no other chunk, and wait for those that are begun."""
        with self._state:
            self._is_over = True
            self._state.notify()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(PeerGoneError):
            while True:
                with self._state:
                    self._state.wait_for(lambda: self._named or self._is_over)
                    self._state.wait_for(lambda: self._is_over, _GATHER_S)
                    if self._is_over:
                        return
                    named, self._named = self._named, []
                with contextlib.suppress(AgentError, OSError):
                    self._copy_chunks(named, lambda: not self._is_over)
                self._tell(len(named))
