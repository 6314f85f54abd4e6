"""The stacks of all threads, of the job and of the processes that it starts, whenever the supervisor asks for them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from typing import Optional

_passed_on_to: set[int] = set()
_descriptor: Optional[int] = None


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


def _pass_on(_number: int, _frame: object) -> None:
    for pid in sorted(_passed_on_to):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
