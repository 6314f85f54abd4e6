"""The node as the client sees it: verbs to call and streams to open, over whatever transport reaches it."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from orchestrator import node_script as scripts
from orchestrator import standby
from orchestrator.errors import (
    CommandTimeoutError,
    ConnectionLostError,
    IntegrityError,
    NodeUnfitError,
    ProtocolMismatchError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.node_errors import environment_error, remote_error
from orchestrator.payload import Payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.transport import BulkStream, ByteStream, CommandResult, Transport
from orchestrator.standby import Standby
from remote_payload.wire import PROTOCOL_VERSION, frames
from remote_payload.wire.codec import WireError, from_json, to_json
from remote_payload.wire.failures import RemoteFailure
from remote_payload.wire.layout import MARKER_NAME, NodeLayout
from remote_payload.wire.messages import Hello, HelloRequest
from remote_payload.wire.names import printable
from remote_payload.wire.stream import StandbyRequest

T = TypeVar("T")
_SHOWN_BYTES = 2000
CLOCK_OFFSET_WARNING_S = 120.0
CLOCK_DOUBT_S = 15.0
BULK_BYTES = 32 * 1024 * 1024
"""What is smaller goes over the connection that is there: another login would take longer than it saves."""
_READY_LIMIT_BYTES = 1024 * 1024
_STANDBY_IDLE_S = 60.0


@dataclasses.dataclass
class ConnectionCounts:
    """How often the node was logged in to, and asked, for provenance and tests."""

    logins: int = 0
    calls: int = 0


class Node:
    """One node, one connection, one payload.

    The connection is made when first needed and made again after it was lost: every verb is repeatable
    (`wire/messages.py`), so a call whose reply was lost is made again within the profile's patience.
    Usable from several threads.
    """

    def __init__(self, profile: ClusterProfile, payload: Payload, connect: Callable[[], Transport]) -> None:
        self.profile = profile
        self.payload = payload
        self.counts = ConnectionCounts()
        self._connect = connect
        self._transport: Transport | None = None
        self._hello: Hello | None = None
        self._hello_about_s = self._hello_took_s = 0.0  # by our clock
        self._standbys: list[Standby] = []
        self._lock = threading.RLock()
        self._hello_lock = threading.Lock()
        self._install_lock = threading.Lock()
        self._installs = 0

    @property
    def hello(self) -> Hello:
        """What the agent says of its node; asked once. Installs the payload where it is missing."""
        with self._hello_lock:
            return self._hello or self.call("hello", self._hello_request, Hello)

    @property
    def _hello_request(self) -> HelloRequest:
        return HelloRequest(self.profile.node_root)

    @property
    def root(self) -> str:
        """The node root for the params of `call`: where `hello` was not asked yet it comes along with that call, which
        saves the way there and back."""
        return self.profile.node_root if self._hello is None else self._hello.root

    def clock_offset_s(self) -> float:
        """The node's clock minus ours, in seconds, by the call that brought `hello`. Where that took so long that it
        may be wrong by more than `CLOCK_DOUBT_S`, it is asked anew."""
        _ = self.hello
        if self._hello_took_s > 2 * CLOCK_DOUBT_S:
            self._hello = None
        _ = self.hello
        with self._lock:
            return self.hello.clock_unix_s - self._hello_about_s

    def shell_noise(self) -> bytes:
        """What a script that prints nothing prints all the same."""
        result = self._ensure_transport().run("exit 0\n", timeout_s=self.profile.command_timeout_s)
        return result.stdout + result.stderr

    @property
    def layout(self) -> NodeLayout:
        return NodeLayout(self.hello.root)

    @property
    def description(self) -> str:
        return self._ensure_transport().description

    def call(self, verb: str, request: object, result: type[T], *, timeout_s: float | None = None) -> T:
        """Call a verb and decode its reply.

        Raises what `remote_error` maps, `ProtocolMismatchError`, or the `UnreachableError` family once patience has run
        out.
        """
        return _decoded(verb, result, self.call_json(verb, to_json(request), timeout_s=timeout_s))

    def call_if_connected(self, verb: str, request: object, result: type[T]) -> T | None:
        """As `call`, once and over the connection that is there: None where there is none, or it is lost. For threads
        from which nobody may be asked to log in."""
        with self._lock:
            if self._transport is None:
                return None
        try:
            return _decoded(verb, result, self._call_once(verb, to_json(request), self.profile.command_timeout_s))
        except UnreachableError:
            return None

    def call_json(self, verb: str, params: Any, *, timeout_s: float | None = None) -> Any:
        """As `call`, with the params and the reply as JSON values."""
        limit_s = timeout_s or self.profile.command_timeout_s
        deadline = time.monotonic() + self.profile.retry.patience_s
        wait_s = 0.5
        while True:
            try:
                return self._call_once(verb, params, limit_s)
            except CommandTimeoutError:
                raise
            except ConnectionLostError:
                self.disconnect()
                if time.monotonic() + wait_s > deadline:
                    raise
                time.sleep(wait_s)
                wait_s = min(wait_s * 2, self.profile.retry.longest_wait_s)

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        """Start a stream verb; returns when the agent reads, with everything before its ready line thrown away.

        For `expected_bytes` that are worth a login, or unknown, on a connection of its own where one can be had.
        """
        self._ensure_payload()
        is_bulk = expected_bytes is None or expected_bytes >= BULK_BYTES
        return self._start_stream(verb, request, idle_timeout_s, is_bulk)

    def script_for_another(self, verb: str, request: object) -> tuple[str, str]:
        """(script, nonce of its ready line) that start a stream verb, for a node that logs in to this one by itself. On
        any other machine than ours the agent says so instead of its ready line."""
        nonce = secrets.token_hex(16)
        text = self._encode(verb, nonce, to_json(request), machine_id=self.hello.machine_id)
        python, root = self.profile.python, self.profile.node_root
        return scripts.stream_script(python, root, self.payload.sha256, nonce, text), nonce

    def prepare_streams(self, how_many: Callable[[float | None], int]) -> None:
        """Begin to open, in the background, bulk streams for `prepared_stream`: as many as `how_many` says of the round
        trip, which the connection tells, or else the first of them. For a node that is connected, so that no login asks
        a person from a thread."""
        self.drop_prepared_streams()
        standbys: list[Standby] = []
        begun = how_many(self._ensure_transport().round_trip_s)

        def open_first() -> ByteStream:
            stream = self._open_standby()
            if isinstance(stream, BulkStream):
                with self._lock:
                    if self._standbys is standbys:
                        more = how_many(stream.facts.round_trip_s) - begun
                        standbys.extend(Standby(self._open_standby) for _ in range(more))
            return stream

        with self._lock:
            self._standbys = standbys
            standbys.append(Standby(open_first))
            standbys.extend(Standby(self._open_standby) for _ in range(begun - 1))
        threading.Thread(target=self._learn, name="hello", daemon=True).start()

    def prepared_stream(self, expected_bytes: int, /) -> ByteStream | None:
        """The next stream of `prepare_streams`, whose agent is on stand-by. None where there is none, or it did not
        come up: whoever asks then opens one and hears why. What is not worth a login leaves them to others."""
        is_bulk = expected_bytes >= BULK_BYTES
        with self._lock:
            prepared = self._standbys.pop(0) if is_bulk and self._standbys else None
        return prepared.take(self.profile.command_timeout_s) if prepared is not None else None

    def drop_prepared_streams(self) -> None:
        """Close the streams of `prepare_streams` that nobody asked for."""
        with self._lock:
            standbys, self._standbys = self._standbys, []
        for unused in standbys:
            unused.close()

    def connect(self) -> None:
        """Log in unless that is done, within the profile's patience."""
        self._ensure_transport()

    def reconnect(self) -> None:
        """Drop the connection and log in again, within the profile's patience."""
        self.disconnect()
        self._ensure_transport()

    def disconnect(self) -> None:
        self.drop_prepared_streams()
        with self._lock:
            if self._transport is not None:
                self._transport.close()
                self._transport = None

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disconnect()

    def _ensure_transport(self) -> Transport:
        with self._lock:
            if self._transport is None:
                self._transport = self._connect()
                self.counts.logins += 1
            return self._transport

    def _call_once(self, verb: str, params: Any, limit_s: float) -> Any:
        installs, began = self._installs, time.time()
        result, nonce = self._run_call(verb, params, limit_s)
        if scripts.outcome_said(nonce, result.stdout) == scripts.PAYLOAD_MISSING:
            self._install_payload(installs)
            began = time.time()
            result, nonce = self._run_call(verb, params, limit_s)
        ended = time.time()
        self._refuse_environment_problem(result, nonce)
        value = self._decode(verb, nonce, result)
        hello = value.get("ok") if verb == "hello" else value.get("hello")
        if hello is not None:
            self._note_hello(_decoded(verb, Hello, hello), began, ended)
        if "error" in value:
            raise remote_error(from_json(RemoteFailure, value["error"]))
        return value["ok"]

    def _note_hello(self, hello: Hello, began: float, ended: float) -> None:
        """Of several calls at once that brought it the shortest tells best how late it is there."""
        with self._lock:
            if self._hello is None or ended - began < self._hello_took_s:
                self._hello = hello
                self._hello_about_s, self._hello_took_s = (began + ended) / 2, ended - began

    def _run_call(self, verb: str, params: Any, limit_s: float) -> tuple[CommandResult, str]:
        self.counts.calls += 1
        nonce = secrets.token_hex(16)
        request = self._encode(verb, nonce, params)
        script = scripts.call_script(self.profile.python, self.profile.node_root, self.payload.sha256, nonce, request)
        return self._ensure_transport().run(script, timeout_s=limit_s), nonce

    def _encode(self, verb: str, nonce: str, params: Any, **more: Any) -> str:
        request = {"verb": verb, "nonce": nonce, "protocol": PROTOCOL_VERSION, "params": params, **more}
        if self._is_for_unknown_root(verb, params):
            request["hello"] = to_json(self._hello_request)
        return frames.encode_request(request)

    def _is_for_unknown_root(self, verb: str, params: Any) -> bool:
        """Whether the params hold `root` as it was before `hello` told what that is on the node."""
        is_known = self._hello is not None and self._hello.root == self.profile.node_root
        return verb != "hello" and not is_known and params.get("root") == self.profile.node_root

    def _decode(self, verb: str, nonce: str, result: CommandResult) -> dict[str, Any]:
        try:
            protocol, value, _ = frames.decode_reply(nonce, result.stdout)
        except WireError as error:
            raise ProtocolMismatchError(
                f"the node gave no answer of ours to {verb}: {error} (exit status {result.exit_status})",
                action="Run `remote-eval doctor --cluster …`; it shows what the node printed instead.",
                details=_shown(result),
            ) from error
        if protocol != PROTOCOL_VERSION:
            raise ProtocolMismatchError(
                f"the agent speaks protocol {protocol}, this client {PROTOCOL_VERSION}",
                action="Use the same version of remote-eval on both sides.",
            )
        if not isinstance(value, dict) or ("ok" in value) == ("error" in value):
            raise ProtocolMismatchError(f"the agent's reply to {verb} is neither a result nor a failure")
        return value

    def _learn(self) -> None:
        """Ask what `hello` tells, so that it is known when it is wanted; whoever wants it hears why it cannot be."""
        with contextlib.suppress(RemoteEvalError, OSError):
            _ = self.hello

    def _start_stream(self, verb: str, request: object, idle_timeout_s: float, is_bulk: bool) -> ByteStream:
        nonce = secrets.token_hex(16)
        text = self._encode(verb, nonce, to_json(request))
        script = scripts.stream_script(self.profile.python, self.profile.node_root, self.payload.sha256, nonce, text)
        transport = self._ensure_transport()
        start = transport.open_bulk_stream if is_bulk else transport.open_stream
        stream = start(script, idle_timeout_s=idle_timeout_s)
        try:
            self._await_ready(stream, nonce)
        except BaseException:
            stream.close()
            raise
        return stream

    def _open_standby(self) -> ByteStream:
        return self._start_stream("standby", StandbyRequest(standby.AGENT_IDLE_S), _STANDBY_IDLE_S, is_bulk=True)

    def _ensure_payload(self) -> None:
        """A stream cannot install the payload on its way: make sure by the first call."""
        _ = self.hello

    def _install_payload(self, installs: int) -> None:
        """Unless another call did since there had been so many."""
        with self._install_lock:
            if self._installs == installs:
                self._install_now()
                self._installs += 1

    def _install_now(self) -> None:
        nonce = secrets.token_hex(16)
        script = scripts.install_script(
            self.profile.python,
            self.profile.node_root,
            self.payload.sha256,
            nonce,
            self.payload.path.read_bytes(),
            MARKER_NAME,
        )
        result = self._ensure_transport().run(script, timeout_s=self.profile.command_timeout_s)
        self._refuse_environment_problem(result, nonce)
        outcome = scripts.outcome_said(nonce, result.stdout)
        if outcome == scripts.INSTALL_DAMAGED:
            raise IntegrityError("the payload arrived damaged on the node", action="Run the command again.")
        if outcome != scripts.INSTALLED:
            raise NodeUnfitError(
                f"the payload could not be installed (exit status {result.exit_status})",
                action="Check the profile's `python` and `node_root`.",
                details=_shown(result),
            )

    def _refuse_environment_problem(self, result: CommandResult, nonce: str) -> None:
        error = environment_error(scripts.outcome_said(nonce, result.stdout), self.profile, _shown(result))
        if error is not None:
            raise error

    def _await_ready(self, stream: ByteStream, nonce: str) -> None:
        wanted = scripts.ready_line(nonce)
        seen = b"\n"
        while not seen.endswith(wanted):
            byte = stream.read(1)
            if not byte:
                result = stream.finish(10.0)
                noise = CommandResult(result.exit_status, seen + result.stdout, result.stderr)
                self._refuse_environment_problem(noise, nonce)
                raise ProtocolMismatchError("the agent ended before it was ready", details=_shown(noise))
            seen += byte
            if len(seen) > _READY_LIMIT_BYTES:
                raise ProtocolMismatchError("the node prints without end before the agent starts")


def _decoded(verb: str, cls: type[T], value: Any) -> T:
    try:
        return from_json(cls, value)
    except WireError as error:
        raise ProtocolMismatchError(f"the agent's reply to {verb} is malformed: {error}") from error


def _shown(result: CommandResult) -> str:
    parts = [result.stderr[-_SHOWN_BYTES:], result.stdout[-_SHOWN_BYTES:]]
    return printable(b"\n".join(p.strip() for p in parts if p.strip()).decode(errors="replace"))
