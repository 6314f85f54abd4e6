"""The stacks of all threads, of the job and of the processes that it starts, whenever the supervisor asks for them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterable
from typing import Optional

_passed_on_to: set[int] = set()
_descriptor: Optional[int] = None
_DUMP_S = 2.0
_QUIET_S = 0.05
_UNSEEN_S = 0.2
"""For a dump that goes to standard error, whose growth cannot be seen."""


def dump_when_asked(path: str) -> None:
    """From now on SIGUSR1 appends this process's stacks to `path`, and goes on to those of `pass_on_to`.

    The file stays open as long as the process: a dump opens nothing.
    """
    global _descriptor
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    _descriptor = os.open(path, flags, 0o600)
    # Set before faulthandler's own, which calls it after its dump; it runs only where Python still does.
    signal.signal(signal.SIGUSR1, _pass_on)
    faulthandler.register(signal.SIGUSR1, file=_descriptor, all_threads=True, chain=True)
    faulthandler.enable()


def descriptor() -> Optional[int]:
    """Where stacks go, None where nobody asks for any."""
    return _descriptor


def pass_on_to(pid: int) -> None:
    """This child of ours is asked too. It must have a handler for SIGUSR1, or have been started ignoring it."""
    _passed_on_to.add(pid)


def forget(pid: int) -> None:
    """To be called before the child is reaped: then its number may become another's."""
    _passed_on_to.discard(pid)


def ask(pids: Iterable[int]) -> None:
    """Have these children write their stacks, one after the other: at once, they would write into each other's lines.

    Waits for each until the file has stopped growing, two seconds at most.
    """
    for pid in pids:
        before = _size()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            _await_dump(before)


def _pass_on(_number: int, _frame: object) -> None:
    ask(sorted(_passed_on_to))


def _await_dump(before: int) -> None:
    if _descriptor is None:
        time.sleep(_UNSEEN_S)
        return
    deadline = time.monotonic() + _DUMP_S
    size = before
    while time.monotonic() < deadline:
        time.sleep(_QUIET_S)
        last, size = size, _size()
        if size == last and size > before:
            return


def _size() -> int:
    return 0 if _descriptor is None else os.fstat(_descriptor).st_size
