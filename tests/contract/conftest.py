"""Servers and transports for the contract suite: each promise is tried over both transports, against both servers."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.embedded import ensure_embedded_node, stop_embedded_node
from orchestrator.embedded.files import EmbeddedFiles
from orchestrator.layout import LocalLayout
from orchestrator.ssh.connect import connect
from orchestrator.ssh.settings import ConnectionSettings, RetryPolicy
from orchestrator.ssh.transport import Transport
from tests.support.sshd import Sshd, find_program, start_sshd

NO_PATIENCE = RetryPolicy(patience_s=0.0)
Connect = Callable[..., Transport]


@dataclasses.dataclass(frozen=True)
class Server:
    """A server under test: how to reach it, and how its connections die."""

    name: str
    settings: ConnectionSettings
    kill_connections: Callable[[], None]


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One server for all tests that leave it as it was."""
    server = start_sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def embedded_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConnectionSettings]:
    layout = make_layout(tmp_path_factory.mktemp("embedded"))
    yield ensure_embedded_node(layout)
    stop_embedded_node(layout)


@pytest.fixture(params=["sshd", "embedded"])
def settings(request: pytest.FixtureRequest) -> ConnectionSettings:
    """Each server in turn."""
    if request.param == "sshd":
        sshd: Sshd = request.getfixturevalue("sshd")
        return sshd.settings()
    embedded: ConnectionSettings = request.getfixturevalue("embedded_settings")
    return embedded


@pytest.fixture(params=["sshd", "embedded"])
def mortal_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Each server in turn, for this test alone: it may be killed."""
    if request.param == "sshd":
        sshd = start_sshd(tmp_path / "sshd")
        yield Server("sshd", sshd.settings(), sshd.kill_sessions)
        sshd.stop()
        return
    layout = make_layout(tmp_path / "embedded")
    settings = ensure_embedded_node(layout)
    state = EmbeddedFiles(layout.embedded_node).read_state()
    assert state is not None
    yield Server("embedded", settings, lambda: os.kill(state.pid, signal.SIGKILL))
    stop_embedded_node(layout)


@pytest.fixture(params=["fabric", "openssh"])
def transport_name(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    if request.param == "openssh":
        find_program("ssh", "openssh-client")
    return str(request.param)


@pytest.fixture
def connect_to(transport_name: str, tmp_path: Path) -> Iterator[Connect]:
    """Log in over the transport under test, without patience unless told; everything is closed in the end."""
    opened: list[Transport] = []

    def log_in(settings: ConnectionSettings, retry: RetryPolicy = NO_PATIENCE, **more: object) -> Transport:
        chosen = dataclasses.replace(settings, transport=transport_name)  # type: ignore[arg-type]
        transport = connect(chosen, retry, sockets_folder=tmp_path / "s", **more)  # type: ignore[arg-type]
        opened.append(transport)
        return transport

    yield log_in
    for transport in opened:
        transport.close()


@pytest.fixture
def transport(connect_to: Connect, settings: ConnectionSettings) -> Transport:
    return connect_to(settings)


def make_layout(folder: Path) -> LocalLayout:
    return LocalLayout(folder / "data", folder / "config", folder / "cache")
