"""A stream that is opened before it is known what for, while something else takes its time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.errors import RemoteEvalError
from orchestrator.ssh.transport import ByteStream
from remote_payload.wire.stream import FrameKind, encode_frame

AGENT_IDLE_S = 60.0
"""An agent that waits for its client gives up after so long without a word: that one is gone, or its machine sleeps."""
ALIVE_INTERVAL_S = 15.0
"""How often a client that has nothing to say yet says that it is there."""


class Standby:
    """Opens a stream in a thread of its own, and keeps its agent waiting. Whoever needs it takes it; whoever made it
    closes it."""

    def __init__(self, open_now: Callable[[], ByteStream]) -> None:
        self._open_now = open_now
        self._state = threading.Condition()
        self._stream: ByteStream | None = None
        self._was_opened = False
        self._is_speaking = False
        self._is_closed = False
        threading.Thread(target=self._run, name="standby", daemon=True).start()

    def take(self, timeout_s: float) -> ByteStream | None:
        """The stream, once; None where it did not come up or was lost since, for whatever reason: the caller then opens
        one and hears it. A stream that comes too late, or whose link does not take a sign of life in that time, is
        closed."""
        with self._state:
            is_free = self._state.wait_for(lambda: self._was_opened and not self._is_speaking, timeout_s)
            self._is_closed = True
            self._state.notify_all()
            stream, self._stream = self._stream, None
        if stream is None or is_free:
            return stream
        stream.close()
        return None

    def close(self) -> None:
        """Do without it. Does not wait for one that is still being opened."""
        stream = self.take(0.0)
        if stream is not None:
            stream.close()

    def _run(self) -> None:
        stream: ByteStream | None = None
        is_late = False
        try:
            stream = self._open_now()
        except (RemoteEvalError, OSError):
            pass  # whoever needs one opens it, and hears why that fails
        finally:
            with self._state:
                is_late, self._was_opened = self._is_closed, True
                self._stream = None if is_late else stream
                self._state.notify_all()
        if stream is None:
            return
        if is_late:
            stream.close()
        else:
            self._keep_alive(stream)

    def _keep_alive(self, stream: ByteStream) -> None:
        """Until somebody takes the stream, or it is lost."""
        while True:
            with self._state:
                if self._state.wait_for(lambda: self._is_closed, ALIVE_INTERVAL_S):
                    return
                self._is_speaking = True
            try:
                # Not under the lock: a dead link takes nothing for long, and whoever wants the stream is not to wait.
                stream.write(encode_frame(FrameKind.ALIVE))
            except (RemoteEvalError, OSError):
                self.close()
            finally:
                with self._state:
                    self._is_speaking = False
                    self._state.notify_all()
