"""Ends a job whose supervisor is gone: nobody would take its results, and it would hold its GPU for nobody."""

from __future__ import annotations

import os
import signal
import threading
import time

_GRACE_S = 10.0


def hold(descriptor: int) -> None:
    """Watch the reading end of the supervisor's lifeline in a thread. Its end ends this process group."""
    threading.Thread(target=_watch, args=(descriptor,), name="remote-eval-lifeline", daemon=True).start()


def _watch(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            continue
    except OSError:
        return
    if os.getpgrp() != os.getpid():
        return
    os.killpg(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.killpg(os.getpid(), signal.SIGKILL)
