"""paramiko's transport and host-key check with the waits bounded and the policy ours."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import paramiko
from paramiko.auth_handler import AuthOnlyHandler
from paramiko.common import cMSG_SERVICE_REQUEST, cMSG_USERAUTH_REQUEST
from paramiko.transport import ServiceRequestingTransport

from orchestrator.errors import HostKeyError
from orchestrator.ssh import diagnosis
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.diagnosis import LoginRecord
from orchestrator.ssh.known_hosts import (
    HostKeyVerdict,
    PublicHostKey,
    judge,
    known_hosts_line,
    known_key_types,
    read_known_hosts,
)
from orchestrator.ssh.settings import HostKeyPolicy, Prompt

_POLL_S = 0.002
_RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256")


class _AuthHandler(AuthOnlyHandler):
    """paramiko 3.2 to 5.1 make the event after sending the request, so a fast answer is lost and the login waits
    for its whole timeout; and `auth_none` calls a callback that is None."""

    def send_auth_request(self, username: str, method: str, finish_message: Any = None) -> list[str]:
        self.auth_method = method
        self.username = username
        message = paramiko.Message()
        message.add_byte(cMSG_USERAUTH_REQUEST)
        message.add_string(username)
        message.add_string("ssh-connection")
        message.add_string(method)
        if finish_message is not None:
            finish_message(message)
        self.auth_event = threading.Event()
        with self.transport.lock:
            self.transport._send_message(message)  # type: ignore[attr-defined]
        return self.wait_for_response(self.auth_event)


class HardenedTransport(ServiceRequestingTransport):
    """A transport that signs in the calling thread (an agent that refuses does not end the connection), keeps what the
    server said when it hung up, and waits for nothing for ever."""

    record: LoginRecord

    def ensure_session(self) -> None:
        if not self.is_active() or not self.initial_kex_done:
            raise EOFError("the connection ended before the login")
        if self._service_userauth_accepted:  # type: ignore[attr-defined]
            return
        message = paramiko.Message()
        message.add_byte(cMSG_SERVICE_REQUEST)
        message.add_string("ssh-userauth")
        self._send_message(message)  # type: ignore[attr-defined]
        deadline = time.monotonic() + (self.auth_timeout or 30.0)
        # paramiko waits here without a limit, also for a server that is gone.
        while not self._service_userauth_accepted:  # type: ignore[attr-defined]
            if not self.is_active():
                raise self.get_exception() or EOFError("the connection ended before the login")
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not begin the login")
            time.sleep(_POLL_S)
        self.auth_handler = self.get_auth_handler()

    def get_auth_handler(self) -> AuthOnlyHandler:
        return _AuthHandler(self)

    def _parse_disconnect(self, m: paramiko.Message) -> None:
        self.record.disconnect_code = m.get_int()
        self.record.server_words.append(m.get_text())


class KnownHostsPolicy(paramiko.MissingHostKeyPolicy):
    """Asked for every host key, since the client is given no keys of its own: only a key that the known_hosts files
    name passes. Under the policy `ask` a person may accept an unknown one; a changed one, never."""

    def __init__(self, effective: EffectiveConfig, policy: HostKeyPolicy, prompt: Prompt) -> None:
        self._effective = effective
        self._policy = policy
        self._prompt = prompt
        try:
            self._lines = read_known_hosts(effective.known_hosts_files)
        except OSError as error:
            raise HostKeyError(
                f"{error.filename} cannot be read: {error.strerror}", action="Check the file's permissions."
            ) from error

    @property
    def key_types(self) -> tuple[str, ...]:
        """Types of the keys that are known, to be asked for first."""
        return known_key_types(self._lines, self._effective.known_hosts_name, self._effective.port)

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        """Return for a known key; raise `HostKeyError` for any other."""
        shown = PublicHostKey(key.get_name(), key.asbytes())
        judgement = judge(self._lines, self._effective.known_hosts_name, shown, self._effective.port)
        if judgement.verdict is HostKeyVerdict.KNOWN:
            return
        if judgement.verdict is not HostKeyVerdict.UNKNOWN or self._policy != "ask":
            raise diagnosis.host_key_error(self._effective, str(shown), judgement)
        question = (
            f"The host key of {self._effective.description} is not known.\n"
            f"Its fingerprint is {shown}\nAccept it (yes/no)? "
        )
        answer = self._prompt(question, True)
        if answer is None:
            raise diagnosis.host_key_error(self._effective, str(shown), judgement)
        if answer.strip().lower() != "yes":
            raise diagnosis.host_key_refused_by_person(self._effective, str(shown))
        self._remember(shown)

    def _remember(self, key: PublicHostKey) -> None:
        files = self._effective.user_known_hosts
        path = files[0] if files else Path.home() / ".ssh" / "known_hosts"
        line = known_hosts_line(self._effective.known_hosts_name, key, hashed=self._effective.hash_known_hosts)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise HostKeyError(f"{path} cannot be written: {error.strerror}") from error


def transport_factory(record: LoginRecord, key_types: tuple[str, ...], keepalive_s: float) -> Any:
    """What `SSHClient.connect` calls to make its transport."""

    def make(sock: Any, **options: Any) -> HardenedTransport:
        transport = HardenedTransport(sock, **options)
        transport.record = record
        transport.daemon = True
        transport.set_keepalive(max(1, round(keepalive_s)))
        wanted = [s for t in key_types for s in (_RSA_SIGNATURES if t == "ssh-rsa" else (t,))]
        security = transport.get_security_options()
        known = [t for t in wanted if t in security.key_types]
        security.key_types = [*known, *(t for t in security.key_types if t not in known)]
        return transport

    return make
