"""The node on loopback: one of it, found again, ended when idle, and outlived by what it started."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.embedded import ensure_embedded_node, stop_embedded_node
from orchestrator.embedded.files import EmbeddedFiles, ServerState
from orchestrator.errors import CommandTimeoutError
from orchestrator.layout import LocalLayout
from orchestrator.ssh import fabric_transport, openssh_transport
from orchestrator.ssh.transport import Transport
from tests.support.relay import Relay

LIMIT_S = 60.0
Connect = Callable[..., Transport]


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[LocalLayout]:
    layout = LocalLayout(tmp_path / "da ta", tmp_path / "config", tmp_path / "cache")
    yield layout
    stop_embedded_node(layout)


@pytest.fixture
def files(layout: LocalLayout) -> EmbeddedFiles:
    return EmbeddedFiles(layout.embedded_node)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_many_starters_get_one_and_the_same_server(layout: LocalLayout, files: EmbeddedFiles) -> None:
    with ThreadPoolExecutor(6) as pool:
        ports = {s.port for s in pool.map(lambda _: ensure_embedded_node(layout), range(6))}
    assert len(ports) == 1
    state = files.read_state()
    assert state is not None
    assert ensure_embedded_node(layout).port == state.port


def test_the_node_listens_on_loopback_alone_and_its_files_are_private(
    layout: LocalLayout, files: EmbeddedFiles
) -> None:
    settings = ensure_embedded_node(layout)
    assert settings.host == "127.0.0.1"
    for path in files.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(files.folder.stat().st_mode) == 0o700
    other_address = socket.gethostbyname(socket.gethostname())
    if not other_address.startswith("127."):
        with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
            socket.create_connection((other_address, settings.port or 0), timeout=2.0)


def test_a_killed_node_is_started_again_with_the_same_keys(
    layout: LocalLayout, files: EmbeddedFiles, connect_to: Connect
) -> None:
    ensure_embedded_node(layout)
    first, key = files.read_state(), files.host_key.read_bytes()
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not files.server_is_alive(), "the server does not die")
    assert connect_to(ensure_embedded_node(layout)).is_alive()
    second = files.read_state()
    assert second is not None
    assert (second.pid != first.pid, files.host_key.read_bytes()) == (True, key)


def test_a_state_file_that_names_another_process_harms_nobody(layout: LocalLayout, files: EmbeddedFiles) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        ensure_embedded_node(layout)
        stop_embedded_node(layout)
        files.write_state(ServerState(bystander.pid, 1, "0" * 32))
        stop_embedded_node(layout)
        assert ensure_embedded_node(layout).port != 1
        stop_embedded_node(layout)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()


def test_an_idle_node_ends_itself_and_a_connected_one_does_not(
    layout: LocalLayout, files: EmbeddedFiles, connect_to: Connect
) -> None:
    settings = ensure_embedded_node(layout, idle_limit_s=1.0)
    transport = connect_to(settings)
    state = files.read_state()
    # Far more than the limit passes on the server's own clock while a connection is there.
    assert transport.run("sleep 3", timeout_s=LIMIT_S).exit_status == 0
    assert files.read_state() == state
    transport.close()
    wait_until(lambda: not files.server_is_alive(), "the idle server does not end")
    assert files.read_state() is None


def test_a_detached_job_outlives_the_node(layout: LocalLayout, connect_to: Connect, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    job = f'read x < "{tmp_path}/go"; echo done > "{tmp_path}/mark"'
    transport = connect_to(ensure_embedded_node(layout))
    transport.run(f"nohup setsid sh -c '{job}' </dev/null >/dev/null 2>&1 &", timeout_s=LIMIT_S)
    stop_embedded_node(layout)
    (tmp_path / "go").write_text("go\n")
    wait_until(lambda: (tmp_path / "mark").exists(), "the job did not outlive the node")


def test_the_nodes_python_is_the_one_that_runs_us(layout: LocalLayout, connect_to: Connect) -> None:
    transport = connect_to(ensure_embedded_node(layout))
    result = transport.run("python3 -c 'import sys; print(sys.prefix)'", timeout_s=LIMIT_S)
    assert result.stdout.decode().strip() == sys.prefix


def test_commands_do_not_inherit_the_clients_environment(
    layout: LocalLayout, connect_to: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    transport = connect_to(ensure_embedded_node(layout))
    assert b"do-not-tell" not in transport.run("env", timeout_s=LIMIT_S).stdout


def test_forwarding_and_shells_are_refused(layout: LocalLayout, files: EmbeddedFiles) -> None:
    settings = ensure_embedded_node(layout)
    base = [
        "ssh", "-F", os.devnull, "-i", str(files.client_key), "-o", "IdentitiesOnly=yes",
        "-o", f'UserKnownHostsFile="{files.known_hosts}"', "-o", "BatchMode=yes", "-p", str(settings.port),
    ]  # fmt: skip
    target = f"{settings.user}@127.0.0.1"
    forwarded = subprocess.run(
        [*base, "-W", f"127.0.0.1:{settings.port}", target], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert forwarded.returncode != 0
    assert b"SSH-" not in forwarded.stdout
    shell = subprocess.run([*base, "-T", target], input=b"echo hello\n", capture_output=True, timeout=60)
    assert (shell.returncode, shell.stdout) == (1, b"")


def test_a_black_hole_is_noticed_by_the_commands_limit(
    connect_to: Connect, layout: LocalLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fabric_transport, openssh_transport):
        monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 1.0)
    settings = ensure_embedded_node(layout)
    relay = Relay(settings.port or 0)
    transport = connect_to(dataclasses.replace(settings, port=relay.port))
    assert transport.is_alive()
    relay.hold()
    with pytest.raises(CommandTimeoutError):
        transport.run("true", timeout_s=1.0)
    assert not transport.is_alive()
    relay.mend()
