"""Starting, finding and stopping the embedded node."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.embedded.files import EmbeddedFiles, ServerState
from orchestrator.errors import InternalError
from orchestrator.layout import LocalLayout
from orchestrator.ssh.settings import ConnectionSettings

HOST = "127.0.0.1"
IDLE_LIMIT_S = 600.0
"""The server ends itself after this long without a connection; jobs that it started go on."""

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.05
_LOG_TAIL_BYTES = 4000


def ensure_embedded_node(layout: LocalLayout, *, idle_limit_s: float = IDLE_LIMIT_S) -> ConnectionSettings:
    """Settings of a running node on loopback, which is started if there is none. Safe to call from several processes.

    Raises `InternalError`, with the server's log, when it does not come up.
    """
    files = EmbeddedFiles(layout.embedded_node)
    with files.locked(_START_TIMEOUT_S + _STOP_TIMEOUT_S):
        files.prepare()
        state = _running(files) or _start(files, idle_limit_s)
    return _settings(files, state)


def stop_embedded_node(layout: LocalLayout) -> None:
    """End the server if one runs, and wait until it is gone. What it started goes on."""
    files = EmbeddedFiles(layout.embedded_node)
    if not files.folder.is_dir():
        return
    with files.locked(_START_TIMEOUT_S + _STOP_TIMEOUT_S):
        _stop(files)


def _settings(files: EmbeddedFiles, state: ServerState) -> ConnectionSettings:
    return ConnectionSettings(
        host=HOST,
        user=getpass.getuser(),
        port=state.port,
        identity_files=(files.client_key,),
        ssh_config_file=Path(os.devnull),
        known_hosts_files=(files.known_hosts,),
    )


def _running(files: EmbeddedFiles) -> ServerState | None:
    """The server that lives and answers. One that lives and does not answer is ended."""
    if not files.server_is_alive():
        return None
    state = files.read_state()
    if state is not None and _answers(state.port):
        return state
    _stop(files)
    return None


def _start(files: EmbeddedFiles, idle_limit_s: float) -> ServerState:
    files.state.unlink(missing_ok=True)
    # `-m` finds the package in the current folder first: the very code that is running here.
    package_parent = Path(__file__).resolve().parents[2]
    with files.open_log() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.embedded", str(files.folder.absolute()), str(idle_limit_s)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=package_parent,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        state = files.read_state()
        if state is not None and state.pid == process.pid and _answers(state.port):
            return state
        time.sleep(_POLL_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    tail = files.log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
    raise InternalError("the node on loopback did not start", action=f"Its log is {files.log}.", details=tail)


def _stop(files: EmbeddedFiles) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        state = files.read_state()
        # The number is the server's as long as the lock is held, and only then.
        if state is None or not files.server_is_alive():
            break
        try:
            os.kill(state.pid, how)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline:
            if not files.server_is_alive():
                files.state.unlink(missing_ok=True)
                return
            time.sleep(_POLL_S)
    if files.server_is_alive():
        raise InternalError("the node on loopback does not end", action=f"End it by hand; its log is {files.log}.")


def _answers(port: int) -> bool:
    """Whether an SSH server is there: the banner tells it from another program that was given the port since."""
    try:
        with socket.create_connection((HOST, port), timeout=_CONNECT_TIMEOUT_S) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
