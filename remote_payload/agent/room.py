"""Making room in the store for a file that is about to arrive: under the profile's limit, and on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Callable, Optional

from remote_payload.agent import quota, store
from remote_payload.agent.failure import AgentError
from remote_payload.agent.store import StoredFile
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.units import human_bytes

_PASSES = 50
_SHOWN_PINS = 5


def make_room(
    layout: NodeLayout,
    digest: str,
    size: int,
    to_come: int,
    limit: Optional[int],
    tell: Callable[[], None],
    *,
    may_free: bool = True,
) -> None:
    """Free the least recently used files that nobody needs, as many as the file of `size` bytes, of which `to_come`
    will still take space, wants; not `may_free`: see that there is room as it is. For a holder of `store_lock`; `tell`
    is called between deletions.

    Raises `AgentError` no_space, with nothing freed, where all of them would not suffice.
    """
    finish_deletions(layout)
    for _ in range(_PASSES):
        tell()
        stored = store.stored_files(layout)
        others = [file for file in stored if file.digest != digest]
        over_limit = 0 if limit is None else size + sum(file.size + file.to_come for file in others) - limit
        free = quota.space_left(layout.root) - sum(file.to_come for file in others)
        excess = max(over_limit, to_come - free)
        if excess <= 0:
            return
        pinned = store.pins(layout, stored)
        chosen = store.least_recently_used(others, pinned, excess)
        if not may_free or sum(file.size for file in chosen) < excess:
            break
        for file in chosen:
            store.free(layout, file)
            tell()
    raise AgentError(
        "no_space",
        _shortage(layout, size, to_come, limit if over_limit > 0 else None, free, others, pinned),
        "Wait for the runs that need those files or cancel them (`remote-eval cancel RUN`), "
        f"{'raise `store_limit_gb` in the profile' if over_limit > 0 else 'free space there'}, "
        "or set another node_root; what has arrived is kept.",
    )


def freeable_bytes(layout: NodeLayout) -> int:
    """What making room could free at most, now."""
    stored = store.stored_files(layout)
    pinned = store.pins(layout, stored)
    return sum(file.size for file in stored if file.folder not in pinned)


def finish_deletions(layout: NodeLayout) -> None:
    """Delete what an interrupted deletion had taken out of the way. For a holder of `store_lock`."""
    if os.path.isdir(layout.checkpoints):
        for entry in os.scandir(layout.checkpoints):
            if layout.is_doomed(entry.name):
                shutil.rmtree(entry.path, ignore_errors=True)


def _shortage(
    layout: NodeLayout,
    size: int,
    to_come: int,
    limit: Optional[int],
    free: int,
    others: Sequence[StoredFile],
    pinned: Mapping[str, tuple[str, ...]],
) -> str:
    """`limit`: None where it is the disk that is too small."""
    there = human_bytes(sum(file.size + file.to_come for file in others))
    if limit is None:
        shortage = (
            f"{human_bytes(to_come)} are still to come and {human_bytes(free)} are free on {quota.disk_of(layout.root)}"
        )
        shortage += f"; the store at {layout.checkpoints} holds {there}"
    else:
        shortage = (
            f"a file of {human_bytes(size)} does not fit in the store at {layout.checkpoints}, "
            f"which holds {there} of at most {human_bytes(limit)}"
        )
    needed = sorted((file for file in others if file.folder in pinned), key=lambda file: -(file.size + file.to_come))
    if not needed:
        return shortage + ", and freeing all of it would not suffice" if others else shortage
    shown = [
        f"{human_bytes(file.size + file.to_come)} by {', '.join(pinned[file.folder])}" for file in needed[:_SHOWN_PINS]
    ]
    more = f" and {len(needed) - _SHOWN_PINS} more files" if len(needed) > _SHOWN_PINS else ""
    pinned_bytes = human_bytes(sum(file.size + file.to_come for file in needed))
    return f"{shortage}, of which {pinned_bytes} are pinned: {'; '.join(shown)}{more}"
