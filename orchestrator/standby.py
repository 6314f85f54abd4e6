"""A stream that is opened before it is known what for, while something else takes its time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.errors import RemoteEvalError
from orchestrator.ssh.transport import ByteStream


class Standby:
    """Opens a stream in a thread of its own. Whoever needs it takes it; whoever made it closes it."""

    def __init__(self, open_now: Callable[[], ByteStream]) -> None:
        self._open_now = open_now
        self._lock = threading.Lock()
        self._stream: ByteStream | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> ByteStream | None:
        """The stream, once; None where it did not come up, for whatever reason: the caller then opens one and hears
        it. A stream that comes too late is closed."""
        self._thread.join(timeout_s)
        with self._lock:
            self._is_closed = True
            stream, self._stream = self._stream, None
        return stream

    def close(self) -> None:
        """Do without it. Does not wait for one that is still being opened."""
        stream = self.take(0.0)
        if stream is not None:
            stream.close()

    def _run(self) -> None:
        try:
            stream = self._open_now()
        except (RemoteEvalError, OSError):
            return
        with self._lock:
            if not self._is_closed:
                self._stream = stream
                return
        stream.close()
