"""Logging in over paramiko the way OpenSSH does: which key when, what is asked of a person, and when to stop."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paramiko
from paramiko.agent import AgentSSH

from orchestrator.errors import UnreachableError
from orchestrator.ssh import diagnosis, keyfiles
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.diagnosis import LoginRecord
from orchestrator.ssh.keyfiles import KeyProblem, KeyTrouble
from orchestrator.ssh.known_hosts import PublicHostKey
from orchestrator.ssh.settings import Prompt
from remote_payload.wire.names import printable

AGENT_TIMEOUT_S = 60.0
"""An agent may ask its person to confirm each use."""

PERSON_TIMEOUT_S = 180.0
"""How long a login may wait for a person; sshd's own limit (LoginGraceTime) is 120 s."""


class Agent(AgentSSH):
    """The ssh agent at `socket_path`, with every wait bounded. `get_keys()` is empty where no agent answers."""

    def __init__(self, socket_path: str | None) -> None:
        super().__init__()
        if not socket_path:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(AGENT_TIMEOUT_S)
        try:
            connection.connect(socket_path)
            self._connect(connection)  # type: ignore[attr-defined]
        except (OSError, paramiko.SSHException):
            connection.close()

    def close(self) -> None:
        self._close()  # type: ignore[attr-defined]


class Login(paramiko.auth_strategy.AuthStrategy):
    """One login: keys first (agent, then files, encrypted ones last), then what the server asks a person for, once.

    Raises `AuthenticationError` or `UnreachableError`; tries nothing twice.
    """

    def __init__(self, effective: EffectiveConfig, prompt: Prompt, record: LoginRecord) -> None:
        super().__init__(paramiko.SSHConfig())
        self._effective = effective
        self._prompt = prompt
        self._record = record

    def get_sources(self) -> Iterator[Any]:
        """Nothing: paramiko's own loop over sources swallows every exception, and is not used."""
        return iter(())

    def authenticate(self, transport: paramiko.Transport) -> Any:
        """Return when the server accepts us."""
        try:
            if not self._log_in(transport):
                raise diagnosis.login_error(self._effective, self._record)
        except (paramiko.SSHException, EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise UnreachableError(
                    f"{self._effective.description} did not answer the login in time",
                    action="The machine may be overloaded; it is tried again.",
                ) from error
            if self._record.methods_not_answered:
                raise diagnosis.login_error(self._effective, self._record) from error
            if transport.is_active():
                self._record.server_words.append(str(error))
                raise diagnosis.login_error(self._effective, self._record) from error
            raise diagnosis.dropped_during_login(self._effective, self._record) from error
        return self

    def _log_in(self, transport: paramiko.Transport) -> bool:
        if self._try(transport, "none", transport.auth_none, self._effective.user):
            return True
        if self._may("publickey") and self._effective.publickey and self._offer_keys(transport):
            return True
        for method in ("keyboard-interactive", "password"):
            if self._may(method) and self._switched_on(method) and self._ask(transport, method):
                return True
        return False

    def _try(self, transport: paramiko.Transport, method: str, call: Any, *arguments: Any) -> bool:
        """One request. True: logged in. False: refused, or accepted as a first step (then more methods are allowed)."""
        limit_s = transport.auth_timeout or 30.0
        began = time.monotonic()
        self._record.methods_tried.append(method)
        try:
            rest = call(*arguments)
        except paramiko.BadAuthenticationType as refusal:
            self._record.allowed_methods = tuple(refusal.allowed_types)
            return False
        except paramiko.AuthenticationException as refusal:
            if not transport.is_active():
                raise EOFError(str(refusal)) from refusal
            if time.monotonic() - began >= limit_s * 0.95:
                raise TimeoutError(str(refusal)) from refusal
            return False
        finally:
            self._note_banner(transport)
        if rest:
            self._record.partial_success = True
            self._record.allowed_methods = tuple(rest)
            return False
        return True

    def _offer_keys(self, transport: paramiko.Transport) -> bool:
        with contextlib.closing(Agent(self._effective.identity_agent)) as agent:
            for key, where in self._keys(agent.get_keys()):
                self._record.offered.append(f"{key.get_name()} {_public(key).fingerprint} ({where})")
                try:
                    if self._try(transport, "publickey", transport.auth_publickey, self._effective.user, key):
                        return True
                except (paramiko.SSHException, OSError) as error:
                    if not transport.is_active():
                        raise
                    # The agent did not sign; the server has not seen this key.
                    self._record.offered.pop()
                    self._record.problems.append(KeyProblem(where, KeyTrouble.SIGNING_FAILED, str(error)))
                if self._record.partial_success and "publickey" not in self._record.allowed_methods:
                    return False
        return False

    def _keys(self, agent_keys: Sequence[Any]) -> Iterator[tuple[paramiko.PKey, str]]:
        """Keys in the order of offering, each once. Files that need a passphrase come last: a person is asked only when
        nothing else opened the door."""
        held = {key.asbytes(): key for key in agent_keys}
        plain: list[Path] = []
        encrypted: list[Path] = []
        for path in dict.fromkeys(self._effective.identity_files):
            facts, problem = keyfiles.look_at_key(path)
            public = facts.public if facts is not None else keyfiles.public_key_file(path)
            if public is not None and public.blob in held:
                yield held.pop(public.blob), f"{path}, in the agent"
            elif problem is not None:
                self._record.problems.append(problem)
            elif facts is not None:
                (encrypted if facts.encrypted else plain).append(path)
        if not self._effective.identities_only:
            for key in held.values():
                yield key, f"agent: {key.comment}" if getattr(key, "comment", "") else "agent"
        for path in [*plain, *encrypted]:
            passphrase = None
            if path in encrypted:
                passphrase = self._prompt(f"Passphrase for the key {path}: ", False)
                if passphrase is None:
                    self._record.problems.append(KeyProblem(str(path), KeyTrouble.LOCKED))
                    continue
            loaded = keyfiles.load_key(path, passphrase)
            if isinstance(loaded, KeyProblem):
                self._record.problems.append(loaded)
            else:
                yield loaded, str(path)

    def _ask(self, transport: paramiko.Transport, method: str) -> bool:
        transport.auth_timeout, usual = PERSON_TIMEOUT_S, transport.auth_timeout
        try:
            if method == "password":
                answer = self._prompt(f"Password for {self._effective.description}: ", False)
                if answer is None:
                    self._record.methods_not_answered.append(method)
                    return False
                return self._try(transport, method, self._send_password, transport, answer)
            return self._try(
                transport, method, transport.auth_interactive, self._effective.user, self._answer_questions
            )
        finally:
            transport.auth_timeout = usual

    def _send_password(self, transport: paramiko.Transport, password: str) -> list[str]:
        return transport.auth_password(self._effective.user, password, fallback=False)

    def _answer_questions(self, title: str, instructions: str, questions: Sequence[tuple[str, bool]]) -> list[str]:
        answers = []
        heading = "".join(f"{t.strip()}\n" for t in (title, instructions) if t.strip())
        for text, echo in questions:
            answer = self._prompt(printable(f"{heading}{self._effective.description}: {text}"), echo)
            if answer is None:
                # An empty answer would count as a failed login; the connection ends instead.
                self._record.methods_not_answered.append("keyboard-interactive")
                raise paramiko.SSHException("there is no terminal to ask on")
            answers.append(answer)
            heading = ""
        return answers

    def _may(self, method: str) -> bool:
        return method in self._record.allowed_methods

    def _switched_on(self, method: str) -> bool:
        return self._effective.password if method == "password" else self._effective.keyboard_interactive

    def _note_banner(self, transport: paramiko.Transport) -> None:
        banner = transport.get_banner() if transport.auth_handler is not None else None
        if banner:
            words = banner.decode("utf-8", "replace").strip()
            if words not in self._record.server_words:
                self._record.server_words.append(words)


def _public(key: paramiko.PKey) -> PublicHostKey:
    return PublicHostKey(key.get_name(), key.asbytes())
