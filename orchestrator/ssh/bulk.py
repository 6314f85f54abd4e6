"""Bulk streams on connections of their own: one `ssh` process each, that logs in without a person or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import secrets
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

from orchestrator.errors import AuthenticationError, ConfigurationError, ConnectionLostError, UnreachableError
from orchestrator.ssh import dial, openssh_messages
from orchestrator.ssh.bulk_process import BulkProcess, BulkProcessStream
from orchestrator.ssh.config import EffectiveConfig, find_ssh, ssh_arguments
from orchestrator.ssh.known_hosts import KnownHost, read_known_hosts
from orchestrator.ssh.openssh_master import hardened_config, hardened_options, option_words, private_folder
from orchestrator.ssh.scripts import marked_command, split_mark, stream_script_bytes
from orchestrator.ssh.settings import ConnectionSettings
from orchestrator.ssh.transport import ByteStream, StreamFacts, Transport

FAST_CIPHER = "aes128-gcm@openssh.com"
_AUTHENTICATED = re.compile(r"^(debug1: )?Authenticated to ", re.MULTILINE)
_END_GRACE_S = 5.0


class BulkLogins:
    """Opens bulk streams to one node. Usable from several threads.

    Nothing is asked of a person: where the login needs one, `open` says so with `AuthenticationError`, once, and
    `is_usable` is False from then on.
    """

    def __init__(self, settings: ConnectionSettings, effective: EffectiveConfig, sockets_folder: Path) -> None:
        self._settings = settings
        self._effective = effective
        self._sockets_folder = sockets_folder
        self._binary = find_ssh()
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._command: list[str] = []
        self._open_streams = 0
        self._under_way: set[BulkProcess] = set()
        self._is_closed = False
        self._needs_person = False
        self._dials = dialling_is_ours(effective)

    @property
    def is_usable(self) -> bool:
        return self._binary is not None and not self._needs_person

    @property
    def open_streams(self) -> int:
        with self._lock:
            return self._open_streams

    def open(self, script: str, idle_timeout_s: float) -> BulkProcessStream:
        """Log in, start `script`, and return when it has said its first byte. One try.

        Raises `AuthenticationError`, `ConfigurationError`, `UnreachableError`.
        """
        folder = self._ensure_folder()
        nonce = secrets.token_hex(8)
        log, facts = folder / f"{nonce}.log", folder / f"{nonce}.facts"
        dials = self._dials
        options = self._dial_options(facts) if dials else []
        command = [*self._command[:1], "-E", str(log), *options, *self._command[1:], marked_command(nonce)]
        try:
            process = BulkProcess(command, self._effective.description, {**os.environ, "LC_ALL": "C"})
        except OSError as error:
            raise ConfigurationError(f"ssh cannot be started: {error.strerror}") from error
        try:
            with self._lock:
                self._refuse_if_closed()
                self._under_way.add(process)
            self._await_first_byte(process, nonce, log, script, idle_timeout_s, facts if dials else None)
        except BaseException:
            process.close()
            _remove(log, facts)
            raise
        finally:
            with self._lock:
                self._under_way.discard(process)
        with self._lock:
            self._open_streams += 1
        carried = dial_facts(_text(_read(facts)))
        _remove(facts)
        return BulkProcessStream(process, nonce, idle_timeout_s, carried, lambda: self._ended(log))

    def close(self) -> None:
        """End logins that are under way and remove what was kept for them. Open streams are their owners' to close."""
        with self._lock:
            self._is_closed = True
            folder, self._folder = self._folder, None
            under_way = list(self._under_way)
        for process in under_way:
            process.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _await_first_byte(
        self, process: BulkProcess, nonce: str, log: Path, script: str, idle_timeout_s: float, dial_facts: Path | None
    ) -> None:
        settings = self._settings
        limit_s = settings.connect_timeout_s + settings.banner_timeout_s + settings.auth_timeout_s + idle_timeout_s
        deadline = time.monotonic() + limit_s
        try:
            process.write(stream_script_bytes(script), limit_s)
            if process.await_first_byte(max(0.0, deadline - time.monotonic())):
                return
        except (BrokenPipeError, ConnectionLostError):
            pass  # the client has ended, and its log says why
        code, stderr = process.wait_for_end(_END_GRACE_S)
        if code is not None and split_mark(nonce, code, stderr)[0] is not None:
            return  # the script ended without a word, which is for its caller to judge
        if dial_facts is not None and not dial_facts.exists():
            self._dials = False
        text = _text(stderr) + "\n" + _text(_read(log))
        if code is None or _AUTHENTICATED.search(text):
            raise ConnectionLostError(
                f"a further connection to {self._effective.description} did not come up", details=text[-2000:]
            )
        known: tuple[KnownHost, ...] = ()
        with contextlib.suppress(OSError):
            known = read_known_hosts(self._effective.known_hosts_files)
        error = openssh_messages.login_failure(text, self._effective, known)
        if isinstance(error, (AuthenticationError, ConfigurationError)):
            self._needs_person = True
        raise error

    def _ensure_folder(self) -> Path:
        with self._lock:
            self._refuse_if_closed()
            if self._folder is None:
                self._folder = private_folder(self._sockets_folder)
                self._command = self._base_command(self._folder)
            return self._folder

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ConnectionLostError(f"the connection to {self._effective.description} is closed")

    def _base_command(self, folder: Path) -> list[str]:
        settings, effective = self._settings, self._effective
        config = hardened_config(settings, folder) if effective.proxy_jump else settings.ssh_config_file
        options = {
            "BatchMode": "yes",
            "ControlMaster": "no",
            "ControlPath": "none",
            "ControlPersist": "no",
            "Compression": "no",
        }
        if FAST_CIPHER in effective.ciphers:
            others = [cipher for cipher in effective.ciphers if cipher != FAST_CIPHER]
            options["Ciphers"] = ",".join([FAST_CIPHER, *others])
        # The first value wins in ssh, so ours stand before -F and what it holds.
        words = [*option_words(**options), *hardened_options(settings)]
        return [
            self._binary or "ssh",
            "-T",
            *words,
            *ssh_arguments(dataclasses.replace(settings, ssh_config_file=config)),
            "--",
            settings.host,
        ]

    def _dial_options(self, facts: Path) -> list[str]:
        effective = self._effective
        words = [
            *(sys.executable, "-I", "-S", str(Path(dial.__file__).absolute())),
            *(effective.hostname, str(effective.port), effective.address_family),
            *(str(math.ceil(self._settings.connect_timeout_s)), str(facts)),
        ]
        return option_words(ProxyCommand=shlex.join(words).replace("%", "%%"), ProxyUseFdpass="yes")

    def _ended(self, log: Path) -> None:
        with self._lock:
            self._open_streams -= 1
        _remove(log)


def dialling_is_ours(effective: EffectiveConfig) -> bool:
    """Whether the socket may be opened by us: nothing in the configuration says how or from where to."""
    leads_elsewhere = effective.proxy_command or effective.proxy_jump or effective.only_openssh
    return sys.platform.startswith("linux") and not leads_elsewhere


def dial_facts(said: str) -> StreamFacts:
    """What `dial` wrote of a connection: nothing, or `bbr 60123`."""
    name, _, round_trip_us = said.strip().partition(" ")
    if not name or not round_trip_us.isdecimal():
        return StreamFacts("ssh")
    return StreamFacts("ssh", name if name != "-" else None, int(round_trip_us) / 1e6)


def open_or_ride(logins: BulkLogins | None, transport: Transport, script: str, idle_timeout_s: float) -> ByteStream:
    """A stream on a connection of its own; over `transport` where a login needs a person, there is no `ssh`, or not
    even one further connection comes up.

    Raises `UnreachableError` where others are open already and the node takes no more.
    """
    if logins is not None and logins.is_usable:
        try:
            return logins.open(script, idle_timeout_s)
        except (AuthenticationError, ConfigurationError):
            pass
        except UnreachableError:
            if logins.open_streams:
                raise
    return transport.open_stream(script, idle_timeout_s=idle_timeout_s)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()[-1024 * 1024 :]
    except OSError:
        return b""


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
