"""The direct way between two nodes: the first logs in to the second by its own means, and sends it the bytes.

No key, agent or word of the user's goes to a node for that: it works where the account there can log in already. It is
tried once, to a host whose key that account knows; where it does not work, or is lost, all goes through this machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.errors import ConfigurationError, ConnectionLostError, RemoteEvalError, UnreachableError
from orchestrator.node import Node
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.config import read_effective_config
from orchestrator.ssh.scripts import REMOTE_COMMAND, stream_script_bytes
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import IDLE_TIMEOUT_S, FrameChannel
from orchestrator.transfer.forwarded import ForwardedStream
from remote_payload.wire.codec import WireError
from remote_payload.wire.forward import ForwardRequest, SshLogin, check_login
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.stream import FrameKind

MAX_STREAMS = 4
"""Logins of one node to the other at a time, each over the one connection that we have to the first."""
_CONNECT_LIMIT_S = 10.0


class DirectWay:
    """A `StreamOpener` for `target` whose streams `source` opens, as long as it can. Usable from several threads.

    `names`: how the two are called. `tell` is told in a sentence which way the bytes take and why, and once more if the
    direct one is lost.
    """

    def __init__(self, source: Node, target: Node, names: tuple[str, str], tell: Callable[[str], None]) -> None:
        self._source = source
        self._target = target
        self.said = ""
        """The last that was told."""
        self._names = names
        self._tell_user = tell
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._open_count = 0
        self._login: SshLogin | None = None
        self._refused: str | None = None
        self.has_worked = False
        """Whether a stream went that way, ever."""
        self._far_end_lost: str | None = None
        self._source_lost = False

    @property
    def layout(self) -> NodeLayout:
        return self._target.layout

    @property
    def is_direct(self) -> bool:
        """Whether bytes went, and still go, from node to node."""
        return self.has_worked and self._refused is None

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        stream = self._open(verb, request, idle_timeout_s)
        if stream is not None:
            return stream
        return self._target.open_agent_stream(
            verb, request, idle_timeout_s=idle_timeout_s, expected_bytes=expected_bytes
        )

    def prepared_stream(self, _expected_bytes: int, /) -> ByteStream | None:
        return None

    def reconnect(self) -> None:
        with self._lock:
            was_source, self._source_lost = self._source_lost, False
        (self._source if was_source else self._target).reconnect()

    def ended(self) -> None:
        with self._lock:
            self._open_count -= 1

    def far_end_was_lost(self, why: str) -> None:
        with self._lock:
            self._far_end_lost = why

    def connection_was_lost(self) -> None:
        with self._lock:
            self._source_lost = True

    def _open(self, verb: str, request: object, idle_timeout_s: float) -> ByteStream | None:
        """A stream that `source` opened; None where that is not to be. Raises `UnreachableError` where others are open,
        or the connection to `source` is at fault."""
        with self._opening:
            if self._refused is not None:
                return None
            others = self._open_count
            if others >= MAX_STREAMS:
                raise ConnectionLostError(f"{self._names[0]} logs in to {self._names[1]} {MAX_STREAMS} times at most")
            if self._far_end_lost is not None and not others:
                self._refuse(self._far_end_lost)
                return None
            try:
                stream = self._start(verb, request, idle_timeout_s)
            except RemoteEvalError as error:
                if others:
                    raise ConnectionLostError(f"a further login did not come up: {error}") from error
                if self.has_worked and isinstance(error, UnreachableError):
                    self.connection_was_lost()
                    raise
                self._refuse(error.cause)
                return None
            with self._lock:
                self._open_count += 1
            if not self.has_worked:
                self.has_worked = True
                self._tell("{} sends to {} itself: no byte of it comes through this machine".format(*self._names))
            may_pack = packs_between(self._source.profile, self._target.profile)
            return ForwardedStream(stream, self, may_pack=may_pack)

    def _refuse(self, why: str) -> None:
        self._refused = why
        near, far = self._names
        verb = "can no longer" if self.has_worked else "does not"
        self._tell(f"the bytes go through this machine: {near} {verb} send to {far} itself ({why})")

    def _tell(self, what: str) -> None:
        self.said = what
        self._tell_user(what)

    def _start(self, verb: str, request: object, idle_timeout_s: float) -> ByteStream:
        if self._login is None:
            self._login = login_between(self._source.profile, self._target.profile)
        script, nonce = self._target.script_for_another(verb, request)
        forward = ForwardRequest(
            self._source.layout.root,
            self._login,
            REMOTE_COMMAND,
            stream_script_bytes(script).decode("utf-8", "surrogateescape"),
            nonce,
            # While it sends what it was asked for, which a slow link may take long for, nothing more is asked.
            IDLE_TIMEOUT_S * 10,
        )
        stream = self._source.open_agent_stream("forward", forward, idle_timeout_s=idle_timeout_s, expected_bytes=0)
        try:
            FrameChannel(stream).receive(FrameKind.FORWARDING)
        except BaseException:
            stream.close()
            raise
        return stream


def packs_between(source: ClusterProfile, target: ClusterProfile) -> bool:
    """Whether floats may go packed from one to the other."""
    return source.pack_floats and target.pack_floats


def login_between(source: ClusterProfile, target: ClusterProfile) -> SshLogin:
    """How a node of `source` is to reach the one of `target`: by the address, user and port that we use.

    Raises `ConfigurationError` where that is not wanted, or only this machine knows the way.
    """
    if not (source.direct_copies and target.direct_copies):
        raise ConfigurationError("`direct_copies` is off in a profile")
    if source.embedded or target.embedded:
        raise ConfigurationError("one of them is this machine")
    settings = target.connection()
    effective = read_effective_config(settings)
    if effective.proxy_jump or effective.proxy_command:
        raise ConfigurationError("from here it is reached by way of another host")
    login = SshLogin(
        effective.hostname, effective.user, effective.port, min(settings.connect_timeout_s, _CONNECT_LIMIT_S)
    )
    try:
        return check_login(login)
    except WireError as error:
        raise ConfigurationError(str(error)) from error
