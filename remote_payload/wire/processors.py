"""How many processors a process may use, on either side."""

from __future__ import annotations

import os


def usable_processors() -> int:
    """Those that it was left with by whoever started it (`taskset`, a container, a batch system), not the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
