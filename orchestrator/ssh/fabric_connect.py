"""Opening the hardened Fabric connection: sockets, jump hosts, host keys, login; each wait bounded."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import fabric
import paramiko

from orchestrator.errors import ConfigurationError, RemoteEvalError
from orchestrator.ssh.bulk import BulkLogins
from orchestrator.ssh.config import EffectiveConfig, read_effective_config
from orchestrator.ssh.diagnosis import LoginRecord
from orchestrator.ssh.fabric_transport import FabricTransport
from orchestrator.ssh.foreign_errors import mapped_connecting
from orchestrator.ssh.hardened import KnownHostsPolicy, transport_factory
from orchestrator.ssh.login import Login
from orchestrator.ssh.settings import ConnectionSettings, Prompt

MAX_HOPS = 8
_UNANSWERED_KEEPALIVES = 3
_PROXY_GRACE_S = 2.0
_MACOS_TCP_RXT_CONNDROPTIME = 0x80
_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}


def connect_fabric(
    settings: ConnectionSettings, effective: EffectiveConfig, prompt: Prompt, sockets_folder: Path
) -> FabricTransport:
    """Log in, through jump hosts where the configuration says so. One try.

    Raises `AuthenticationError` and its kin with a diagnosis, or `UnreachableError`.
    """
    _keep_paramiko_off_the_terminal()
    opened: list[Any] = []
    try:
        connection = _open(settings, effective, prompt, _jumps(effective), opened, 0)
    except BaseException:
        for leftover in reversed(opened):
            with contextlib.suppress(OSError, EOFError):
                leftover.client.close()
        raise
    gateways = [c for c in opened if c is not connection]
    bulk = BulkLogins(settings, effective, sockets_folder)
    return FabricTransport(connection, gateways, effective.description, settings.connect_timeout_s, bulk)


def _open(
    settings: ConnectionSettings,
    effective: EffectiveConfig,
    prompt: Prompt,
    jumps: list[str],
    opened: list[Any],
    depth: int,
) -> Any:
    if depth > MAX_HOPS:
        raise ConfigurationError(f"more than {MAX_HOPS} jump hosts lead to {settings.host}", action="Check ProxyJump.")
    with mapped_connecting(effective.description):
        if jumps:
            sock = _through(settings, effective, prompt, jumps, opened, depth)
        elif effective.proxy_command:
            sock = _proxy_command_socket(effective.proxy_command)
        else:
            sock = _tcp_socket(settings, effective)
    record = LoginRecord()
    try:
        policy = KnownHostsPolicy(effective, settings.host_key_policy, prompt)
        connection = fabric.Connection(
            effective.hostname,
            user=effective.user,
            port=effective.port,
            config=fabric.Config(overrides={"forward_agent": False}, ssh_config=paramiko.SSHConfig(), lazy=True),
            gateway=False,
            forward_agent=False,
            connect_kwargs={
                "sock": sock,
                "timeout": settings.connect_timeout_s + settings.banner_timeout_s,
                "banner_timeout": settings.banner_timeout_s,
                "auth_timeout": settings.auth_timeout_s,
                "channel_timeout": settings.connect_timeout_s,
                "allow_agent": False,
                "look_for_keys": False,
                "transport_factory": transport_factory(record, policy.key_types, settings.keepalive_s),
                "auth_strategy": Login(effective, prompt, record),
            },
        )
    except BaseException:
        sock.close()
        raise
    connection.client.set_missing_host_key_policy(policy)
    opened.append(connection)
    with mapped_connecting(effective.description):
        connection.open()
    return connection


def _through(
    settings: ConnectionSettings,
    effective: EffectiveConfig,
    prompt: Prompt,
    jumps: list[str],
    opened: list[Any],
    depth: int,
) -> Any:
    """A channel to the target on a connection to the last jump host, which is reached through those before it; the
    first follows its own configuration, as with OpenSSH."""
    *before, last = jumps
    hop_settings = _hop_settings(settings, last)
    hop = read_effective_config(hop_settings)
    try:
        gateway = _open(hop_settings, hop, prompt, before or _jumps(hop), opened, depth + 1)
    except RemoteEvalError as error:
        error.details = f"while logging in to the jump host {hop.description}\n{error.details}".strip()
        raise
    return gateway.transport.open_channel(
        "direct-tcpip", (effective.hostname, effective.port), ("", 0), timeout=settings.connect_timeout_s
    )


def _hop_settings(settings: ConnectionSettings, jump: str) -> ConnectionSettings:
    """Settings of a jump host `[user@]host[:port]` or `ssh://…`; what the profile says of the node is not for it."""
    url = urllib.parse.urlsplit(jump if jump.startswith("ssh://") else f"ssh://{jump}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host, port = None, None
    if not host:
        raise ConfigurationError(f"{jump!r} is no jump host", action="Check ProxyJump in ~/.ssh/config.")
    # urlsplit lowers the case of a host, and an alias is looked up as it is written.
    written = jump.removeprefix("ssh://").rpartition("@")[2]
    at = written.lower().find(host)
    name = written[at : at + len(host)] if at >= 0 else host
    return dataclasses.replace(settings, host=name, user=url.username, port=port, identity_files=())


def _jumps(effective: EffectiveConfig) -> list[str]:
    """The jump hosts that the configuration names, first hop first. A host that would jump through itself (`Host *`
    with a ProxyJump) goes straight, as with OpenSSH."""
    if not effective.proxy_jump:
        return []
    jumps = [jump.strip() for jump in effective.proxy_jump.split(",") if jump.strip()]
    last = jumps[-1].removeprefix("ssh://").rpartition("@")[2]
    names = {effective.alias, effective.hostname}
    is_itself = last in names | {f"{name}:{effective.port}" for name in names}
    return [] if is_itself and len(jumps) == 1 else jumps


def _tcp_socket(settings: ConnectionSettings, effective: EffectiveConfig) -> socket.socket:
    """A connected socket: each address of the host in turn, within the connect timeout each."""
    family = _FAMILIES[effective.address_family]
    addresses = socket.getaddrinfo(effective.hostname, effective.port, family, socket.SOCK_STREAM)
    trouble: OSError | None = None
    for found_family, kind, protocol, _, address in addresses:
        sock = socket.socket(found_family, kind, protocol)
        try:
            sock.settimeout(settings.connect_timeout_s)
            sock.connect(address)
        except OSError as error:
            sock.close()
            trouble = error
            continue
        _notice_dead_peers(sock, settings.keepalive_s)
        return sock
    raise trouble or OSError(f"no address for {effective.hostname}")


def _notice_dead_peers(sock: socket.socket, keepalive_s: float) -> None:
    """Let the kernel give up on data that nobody acknowledges; otherwise that takes it a quarter of an hour."""
    limit_s = max(1, math.ceil(keepalive_s * _UNANSWERED_KEEPALIVES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_s * 1000)
        elif sys.platform == "darwin":
            sock.setsockopt(socket.IPPROTO_TCP, _MACOS_TCP_RXT_CONNDROPTIME, limit_s)


def _proxy_command_socket(command: str) -> _ProxySocket:
    """The ProxyCommand's standard streams as a socket. A shell runs it, as with OpenSSH."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    return _ProxySocket(ours, process)


class _ProxySocket(socket.socket):
    """A socket whose other end is a process, which ends when the socket is closed."""

    def __init__(self, connected: socket.socket, process: subprocess.Popen[bytes]) -> None:
        super().__init__(connected.family, connected.type, connected.proto, connected.detach())
        self._process = process

    def close(self) -> None:
        super().close()
        self._process.terminate()
        try:
            self._process.wait(_PROXY_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _keep_paramiko_off_the_terminal() -> None:
    """paramiko logs each failed login with a traceback, and Python prints that where nobody listens."""
    logger = logging.getLogger("paramiko")
    if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        logger.addHandler(logging.NullHandler())
