"""Several bulk streams at once: each logs in once, serves one piece of work after another, and is missed if lost."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from orchestrator import standby
from orchestrator.errors import CommandTimeoutError, RemoteEvalError, UnreachableError
from orchestrator.ssh.transport import ByteStream
from orchestrator.standby import Standby
from orchestrator.transfer.channel import FrameChannel, StreamDamagedError, StreamOpener
from remote_payload.wire.codec import to_json
from remote_payload.wire.stream import FrameKind, StandbyRequest, StreamCall

LOGIN_SPACING_S = 0.05
"""Between two logins; servers count those that are not through yet (MaxStartups) and turn away the next."""
MAX_LOGINS_AT_ONCE = 3
MAX_NEAR_LOGINS_AT_ONCE = 6
"""A near node is through with one before the third after it begins."""
_JOIN_S = 30.0
_LEAVING_S = 5.0
"""So long, at most, streams that were just given some work that is over are waited for, so that they can be kept."""
_TAKE_S = 10.0
_ENDS = (RemoteEvalError, OSError, ValueError, EOFError)


@dataclasses.dataclass(frozen=True)
class StreamEnd:
    """How one stream ended its work. `error` None: as it should. `was_open`: its login had come up. `is_fresh`: it had
    served nothing before."""

    error: BaseException | None
    was_open: bool
    is_fresh: bool = True

    @property
    def is_local(self) -> bool:
        """Whether only this stream is to blame, so that others, or a new one, may do better."""
        return isinstance(self.error, (UnreachableError, StreamDamagedError))


@dataclasses.dataclass(frozen=True)
class _Idle:
    standby: Standby
    is_fresh: bool


@dataclasses.dataclass(frozen=True)
class _Work:
    call: StreamCall
    serve: Callable[[ByteStream], None]
    on_change: Callable[[], None]


class StreamPool:
    """Bulk streams, on stand-by between one piece of work and the next. Leaving the context ends them all.

    A login under way is left to itself, since on a network that was lost it takes as long as it may: when it comes its
    stream serves what is to be done then, or is closed.
    """

    def __init__(self, opener: StreamOpener, *, idle_timeout_s: float) -> None:
        self.expected_bytes = 0
        """What all the work to come will carry."""
        self._opener = opener
        self._idle_timeout_s = idle_timeout_s
        self._changed = threading.Condition()
        self._idle: list[_Idle] = []
        self._serving: dict[threading.Thread, ByteStream | None] = {}
        self._ends: list[StreamEnd] = []
        self._opening = 0
        self._last_login = float("-inf")
        self._work: _Work | None = None
        self._is_closed = False

    @property
    def open_count(self) -> int:
        """Streams at work."""
        with self._changed:
            return len(self._serving)

    @property
    def count(self) -> int:
        """Streams at work, or being opened."""
        with self._changed:
            return len(self._serving) + self._opening

    @property
    def is_empty(self) -> bool:
        """Whether there is no stream, not even on stand-by or being opened."""
        with self._changed:
            return not (self._serving or self._opening or self._idle)

    @contextlib.contextmanager
    def work(
        self, verb: str, request: object, serve: Callable[[ByteStream], None], on_change: Callable[[], None]
    ) -> Iterator[None]:
        """For the time of the context, streams perform `verb`, one piece of work at a time. `serve(stream)` is called
        in a thread for each. Where it returns the stream's agent is on stand-by again; where it raises the stream ends.

        The owner asks for a number of streams with `open_up_to` as often as it likes, and takes what has ended with
        `ended`; `on_change` is called, from any thread, when there is something to see. Where the work fails all
        streams end, since the others may be as lost as the one that it failed with.
        """
        with self._changed:
            self._work, self._ends = _Work(StreamCall(verb, to_json(request)), serve, on_change), []
        try:
            yield
            with self._changed:
                self._changed.wait_for(lambda: not self._serving, _LEAVING_S)
        except BaseException:
            self._end_work()
            self._drop_idle()
            raise
        self._end_work()

    def open_up_to(self, wanted: int, logins_at_once: int = MAX_LOGINS_AT_ONCE) -> None:
        """Have streams on stand-by go to work, and if there are fewer than `wanted` begin to open one more, unless the
        last login was too short a while ago."""
        with self._changed:
            work, now = self._work, time.monotonic()
            if self._is_closed or work is None:
                return
            while self._idle and len(self._serving) < wanted:
                idle = self._idle.pop()
                thread = threading.Thread(target=self._run, args=(work, idle), name=work.call.verb, daemon=True)
                self._serving[thread] = None
                thread.start()
            if len(self._serving) + self._opening >= wanted:
                return
            if self._opening >= logins_at_once or now - self._last_login < LOGIN_SPACING_S:
                return
            self._opening += 1
            self._last_login = now
            threading.Thread(target=self._log_in, name="login", daemon=True).start()

    def ended(self) -> list[StreamEnd]:
        """The ends since the last call."""
        with self._changed:
            ends, self._ends = self._ends, []
            return ends

    def close(self) -> None:
        """End all streams, whatever they are at. Does not wait for a login under way."""
        with self._changed:
            self._is_closed = True
        self._close_serving()
        self._drop_idle()

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _end_work(self) -> None:
        with self._changed:
            self._work = None
        for thread in self._close_serving():
            thread.join(_JOIN_S + self._idle_timeout_s)

    def _close_serving(self) -> list[threading.Thread]:
        with self._changed:
            serving = dict(self._serving)
        for stream in serving.values():
            if stream is not None:
                stream.close()
        return list(serving)

    def _drop_idle(self) -> None:
        with self._changed:
            idle, self._idle = self._idle, []
        for one in idle:
            one.standby.close()

    def _log_in(self) -> None:
        stream: ByteStream | None = None
        error: BaseException | None = None
        is_fresh = False
        try:
            stream = self._opener.prepared_stream(self.expected_bytes)
            if stream is None:
                is_fresh = True
                stream = self._opener.open_agent_stream(
                    "standby",
                    StandbyRequest(standby.AGENT_IDLE_S),
                    idle_timeout_s=self._idle_timeout_s,
                    expected_bytes=self.expected_bytes,
                )
        except BaseException as caught:
            error = caught
            if not isinstance(caught, _ENDS):
                raise
        finally:
            with self._changed:
                self._opening -= 1
                work = self._work
                if stream is None:
                    self._ends.append(StreamEnd(error, was_open=False))
            if stream is not None:
                self._keep(stream, is_fresh=is_fresh)
            if work is not None:
                work.on_change()

    def _keep(self, stream: ByteStream, *, is_fresh: bool = False) -> None:
        """For whatever is to be done next, unless all is over."""
        with self._changed:
            if not self._is_closed:
                self._idle.append(_Idle(Standby(lambda: stream), is_fresh))
                return
        stream.close()

    def _run(self, work: _Work, idle: _Idle) -> None:
        error: BaseException | None = None
        try:
            self._serve(work, idle)
        except BaseException as caught:
            error = caught
            if not isinstance(caught, _ENDS):
                raise
        finally:
            if isinstance(error, CommandTimeoutError):
                self._drop_idle()  # a link that went silent is silent for all of them
            with self._changed:
                del self._serving[threading.current_thread()]
                self._ends.append(StreamEnd(error, was_open=True, is_fresh=idle.is_fresh))
                self._changed.notify_all()
            work.on_change()

    def _serve(self, work: _Work, idle: _Idle) -> None:
        stream = idle.standby.take(_TAKE_S)
        if stream is None:
            return  # lost meanwhile
        with self._changed:
            is_wanted = self._work is work and not self._is_closed
            if is_wanted:
                self._serving[threading.current_thread()] = stream
        try:
            if is_wanted:
                FrameChannel(stream).send_json(FrameKind.PERFORM, work.call)
                work.serve(stream)
        except BaseException:
            stream.close()
            raise
        self._keep(stream)
