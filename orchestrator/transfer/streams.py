"""Several bulk streams at once: opened one after the other, each served in a thread, missed when they end."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from orchestrator.errors import RemoteEvalError, UnreachableError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import StreamDamagedError, StreamOpener

LOGIN_SPACING_S = 0.05
"""Between two logins; servers count those that are not through yet (MaxStartups) and turn away the next."""
MAX_LOGINS_AT_ONCE = 3
MAX_NEAR_LOGINS_AT_ONCE = 6
"""A near node is through with one before the third after it begins."""
_JOIN_S = 30.0


@dataclasses.dataclass(frozen=True)
class StreamEnd:
    """How one stream of a pool ended. `error` None: as it should. `was_open`: the agent had said that it is ready."""

    error: BaseException | None
    was_open: bool

    @property
    def is_local(self) -> bool:
        """Whether only this stream is to blame, so that others, or a new one, may do better."""
        return isinstance(self.error, (UnreachableError, StreamDamagedError))


class StreamPool:
    """Bulk streams of one verb. `serve(stream)` is called in a thread for each. Behind it the stream is closed, or
    handed to the opener where the answer is True: its agent is on stand-by.

    The owner asks for a number of streams with `open_up_to` as often as it likes, and takes what has ended with
    `ended`; `on_change` is called, from any thread, when there is something to see. Leaving the context ends all
    streams and waits until none is served any more. A login under way is left to itself, since on a network that was
    lost it takes as long as it may: its stream is closed when it comes.
    """

    def __init__(
        self,
        opener: StreamOpener,
        verb: str,
        request: object,
        serve: Callable[[ByteStream], bool | None],
        on_change: Callable[[], None],
        *,
        idle_timeout_s: float,
        expected_bytes: int,
    ) -> None:
        self._opener = opener
        self._verb = verb
        self._request = request
        self._serve = serve
        self._on_change = on_change
        self._idle_timeout_s = idle_timeout_s
        self._expected_bytes = expected_bytes
        self._lock = threading.Lock()
        self._streams: list[ByteStream] = []
        self._serving: list[threading.Thread] = []
        self._ends: list[StreamEnd] = []
        self._opening = 0
        self._last_login = float("-inf")
        self._is_closed = False

    @property
    def open_count(self) -> int:
        with self._lock:
            return len(self._streams)

    @property
    def count(self) -> int:
        """Streams that are open or being opened."""
        with self._lock:
            return len(self._streams) + self._opening

    def open_up_to(self, wanted: int, logins_at_once: int = MAX_LOGINS_AT_ONCE) -> None:
        """Begin to open one more stream if there are fewer than `wanted`, and the last login was long enough ago."""
        with self._lock:
            now = time.monotonic()
            if self._is_closed or len(self._streams) + self._opening >= wanted:
                return
            if self._opening >= logins_at_once or now - self._last_login < LOGIN_SPACING_S:
                return
            self._opening += 1
            self._last_login = now
            threading.Thread(target=self._run, name=self._verb, daemon=True).start()

    def ended(self) -> list[StreamEnd]:
        """The ends since the last call."""
        with self._lock:
            ends, self._ends = self._ends, []
            return ends

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._is_closed = True
            streams, serving = list(self._streams), list(self._serving)
        for stream in streams:
            stream.close()
        for thread in serving:
            thread.join(_JOIN_S + self._idle_timeout_s)

    def _run(self) -> None:
        error: BaseException | None = None
        was_open = False
        try:
            stream = self._open()
            if stream is None:
                return
            was_open = True
            self._on_change()
            is_kept: bool | None = False
            try:
                is_kept = self._serve(stream)
            finally:
                with self._lock:
                    self._streams.remove(stream)
                if is_kept:
                    self._opener.keep_stream(stream)
                else:
                    stream.close()
        except (RemoteEvalError, OSError, ValueError, EOFError) as caught:
            error = caught
        except BaseException as caught:
            error = caught
            raise
        finally:
            with self._lock:
                self._ends.append(StreamEnd(error, was_open))
            self._on_change()

    def _open(self) -> ByteStream | None:
        try:
            stream = self._opener.open_agent_stream(
                self._verb,
                self._request,
                idle_timeout_s=self._idle_timeout_s,
                expected_bytes=self._expected_bytes,
            )
        finally:
            with self._lock:
                self._opening -= 1
        with self._lock:
            if not self._is_closed:
                self._streams.append(stream)
                self._serving = [other for other in self._serving if other.is_alive()] + [threading.current_thread()]
                return stream
        stream.close()
        return None
