"""What every transport promises, over real servers."""

from __future__ import annotations

import hashlib
import os
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import CommandTimeoutError, ConnectionLostError, UnreachableError
from orchestrator.ssh.settings import ConnectionSettings
from orchestrator.ssh.transport import ByteStream, Transport
from tests.support.relay import Relay
from tests.support.sshd import Sshd, find_program, login_shell_option, make_key, make_noisy_home

LIMIT_S = 60.0
MEGABYTE = 1024 * 1024
EVERY_BYTE = bytes(range(256))
Connect = Callable[..., Transport]


def octal(data: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in data)


def read_to_end(stream: ByteStream) -> bytes:
    parts = []
    while part := stream.read(256 * 1024):
        parts.append(part)
    return b"".join(parts)


def write_for_ever(stream: ByteStream) -> None:
    while True:
        stream.write(bytes(MEGABYTE))


def read_exactly(stream: ByteStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data))
        assert part, f"the stream ended after {data!r}"
        data += part
    return data


def test_both_streams_carry_every_byte(transport: Transport) -> None:
    result = transport.run(f"printf '{octal(EVERY_BYTE)}'; printf '{octal(EVERY_BYTE[::-1])}' >&2", timeout_s=LIMIT_S)
    assert (result.exit_status, result.stdout, result.stderr) == (0, EVERY_BYTE, EVERY_BYTE[::-1])


@pytest.mark.parametrize("status", [0, 1, 2, 3, 42, 77, 126, 127, 128, 137, 200, 253, 254, 255])
def test_the_exit_status_is_the_scripts_own(transport: Transport, status: int) -> None:
    result = transport.run(f"echo out; echo err >&2; exit {status}", timeout_s=LIMIT_S)
    assert (result.exit_status, result.stdout, result.stderr) == (status, b"out\n", b"err\n")


@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("KILL", 9), ("SEGV", 11)])
def test_death_by_a_signal_is_told_as_128_and_the_signal(transport: Transport, name: str, number: int) -> None:
    assert transport.run(f"kill -{name} $$", timeout_s=LIMIT_S).exit_status == 128 + number


def test_when_the_outer_shells_are_killed_too_the_connection_is_not_blamed(transport: Transport) -> None:
    # The server either names no status at all, or has a shell of its own that tells the signal.
    assert transport.run("kill -9 $PPID $$", timeout_s=LIMIT_S).exit_status in (None, 137)
    assert transport.run("exit 5", timeout_s=LIMIT_S).exit_status == 5


def test_the_last_commands_status_is_the_scripts_when_it_names_none(transport: Transport) -> None:
    assert transport.run("true\nfalse", timeout_s=LIMIT_S).exit_status == 1
    assert transport.run("", timeout_s=LIMIT_S).exit_status == 0


def test_megabytes_on_both_streams_at_once_do_not_block_each_other(transport: Transport) -> None:
    count = 6 * MEGABYTE
    script = f"head -c {count} /dev/zero | tr '\\000' e >&2 & head -c {count} /dev/zero | tr '\\000' o; wait"
    result = transport.run(script, timeout_s=LIMIT_S)
    assert result.exit_status == 0
    assert (result.stdout.count(b"o"), len(result.stdout)) == (count, count)
    assert (result.stderr.count(b"e"), len(result.stderr)) == (count, count)


def test_output_beyond_the_bound_is_dropped_and_the_command_still_ends(transport: Transport) -> None:
    result = transport.run("head -c 5000000 /dev/zero; exit 4", timeout_s=LIMIT_S, max_output_bytes=1000)
    assert (result.exit_status, result.stdout) == (4, bytes(1000))


@pytest.mark.parametrize(
    "text",
    [
        'it\'s "quoted" `back` $(echo no) ${HOME} $$ \\ \\n',
        "two\nlines\n\nand a tab\t",
        "naïve Übergröße 日本語 🧠",
        "! history % jobs # comment ~ * ? [a] {b,c} ; & | < > (d)",
        "-n -e --",
    ],
)
def test_text_of_any_kind_arrives_as_it_was_written(transport: Transport, text: str) -> None:
    result = transport.run(f"printf %s {shlex.quote(text)}", timeout_s=LIMIT_S)
    assert result.stdout.decode() == text


def test_a_here_document_of_megabytes_arrives_whole(transport: Transport) -> None:
    lines = "".join(f"{i:07d} 'x' $(y) \\\n" for i in range(150_000))
    result = transport.run(f"sha256sum <<'END'\n{lines}END\n", timeout_s=LIMIT_S)
    assert result.stdout.split()[0].decode() == hashlib.sha256(lines.encode()).hexdigest()


def test_commands_of_a_script_find_standard_input_at_its_end(transport: Transport) -> None:
    result = transport.run('cat; read line; echo "<$line> $?"\necho after', timeout_s=LIMIT_S)
    assert result.stdout == b"<> 0\nafter\n" or result.stdout == b"<> 1\nafter\n"


def test_a_script_that_does_not_parse_runs_no_part_of_itself(transport: Transport) -> None:
    result = transport.run("echo begun\nif true; then\n", timeout_s=LIMIT_S)
    assert result.stdout == b""
    assert result.exit_status not in (0, None)


def test_a_command_that_takes_too_long_says_so_and_leaves_the_connection_usable(transport: Transport) -> None:
    with pytest.raises(CommandTimeoutError):
        transport.run("sleep 600", timeout_s=1.0)
    assert transport.run("echo still here", timeout_s=LIMIT_S).stdout == b"still here\n"


def test_a_command_that_talks_for_ever_is_ended_too(transport: Transport) -> None:
    with pytest.raises(CommandTimeoutError):
        transport.run("while :; do echo talk; done", timeout_s=1.0, max_output_bytes=1000)
    assert transport.is_alive()


def test_a_detached_child_outlives_its_command(transport: Transport, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    os.mkfifo(tmp_path / "go")
    job = f"read x < {tmp_path}/go; echo done > {mark}.part; mv {mark}.part {mark}"
    script = f"nohup setsid sh -c {shlex.quote(job)} </dev/null >/dev/null 2>&1 &"
    assert transport.run(script, timeout_s=LIMIT_S).exit_status == 0
    transport.close()
    (tmp_path / "go").write_text("go\n")
    deadline = time.monotonic() + LIMIT_S
    while not mark.exists():
        assert time.monotonic() < deadline, "the child did not outlive the connection"
        time.sleep(0.02)


def test_several_threads_share_one_connection(transport: Transport) -> None:
    def ask(number: int) -> bytes:
        return transport.run(f"echo {number}; head -c 100000 /dev/zero", timeout_s=LIMIT_S).stdout

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    assert answers == [f"{i}\n".encode() + bytes(100000) for i in range(36)]


def test_bulk_data_goes_up_and_ends_at_the_half_close(transport: Transport) -> None:
    data = os.urandom(8 * MEGABYTE)
    with transport.open_stream("echo ready; exec sha256sum", idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 6) == b"ready\n"
        for start in range(0, len(data), MEGABYTE):
            stream.write(memoryview(data)[start : start + MEGABYTE])
        stream.close_write()
        answer = read_to_end(stream)
        result = stream.finish(LIMIT_S)
    assert answer.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert (result.exit_status, result.stdout) == (0, b"")


def test_bulk_data_comes_down_whole(transport: Transport) -> None:
    count = 12 * MEGABYTE
    with transport.open_stream(f"head -c {count} /dev/zero; echo end >&2; exit 9", idle_timeout_s=LIMIT_S) as stream:
        received = read_to_end(stream)
        result = stream.finish(LIMIT_S)
    assert (len(received), received.count(b"\0")) == (count, count)
    assert (result.exit_status, result.stderr) == (9, b"end\n")


def test_data_goes_both_ways_at_once(transport: Transport) -> None:
    data = os.urandom(6 * MEGABYTE)
    with transport.open_stream("echo ready; exec cat", idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 6) == b"ready\n"

        def send() -> None:
            stream.write(data)
            stream.close_write()

        sender = threading.Thread(target=send)
        sender.start()
        echoed = read_to_end(stream)
        sender.join(LIMIT_S)
        assert not sender.is_alive()
        assert stream.finish(LIMIT_S).exit_status == 0
    assert echoed == data


def test_what_was_not_read_of_a_stream_is_in_its_result(transport: Transport) -> None:
    with transport.open_stream("echo one; echo two; echo three >&2; exit 255", idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 4) == b"one\n"
        result = stream.finish(LIMIT_S)
    assert (result.exit_status, result.stdout, result.stderr) == (255, b"two\n", b"three\n")


def test_much_standard_error_does_not_stop_a_stream(transport: Transport) -> None:
    script = f"head -c {3 * MEGABYTE} /dev/zero >&2; echo ready; cat >/dev/null; echo gone"
    with transport.open_stream(script, idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 6) == b"ready\n"
        stream.write(bytes(MEGABYTE))
        stream.close_write()
        assert read_to_end(stream) == b"gone\n"
        assert len(stream.finish(LIMIT_S).stderr) == 3 * MEGABYTE


def test_a_stream_on_which_nothing_moves_says_so(transport: Transport) -> None:
    with transport.open_stream("echo ready; sleep 600", idle_timeout_s=0.5) as stream:
        assert read_exactly(stream, 6) == b"ready\n"
        with pytest.raises(CommandTimeoutError):
            stream.read(1)
        with pytest.raises(CommandTimeoutError):
            stream.write(bytes(64 * MEGABYTE))
    assert transport.is_alive()


def test_leaving_a_stream_early_ends_its_script(transport: Transport, tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    # `cat` meets end of file when the stream is left, and the script goes on to its last line.
    with transport.open_stream(f"echo ready; cat >/dev/null; : > {mark}", idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 6) == b"ready\n"
    deadline = time.monotonic() + LIMIT_S
    while not mark.exists():
        assert time.monotonic() < deadline, "the script still runs"
        time.sleep(0.02)
    assert transport.run("echo usable", timeout_s=LIMIT_S).stdout == b"usable\n"


def test_a_living_connection_is_alive_and_a_closed_one_is_not(transport: Transport) -> None:
    assert transport.is_alive()
    transport.close()
    transport.close()
    assert not transport.is_alive()
    with pytest.raises(UnreachableError):
        transport.run("true", timeout_s=LIMIT_S)


def test_a_connection_killed_under_a_command_is_lost_not_failed(connect_to: Connect, mortal_server: object) -> None:
    server = mortal_server
    transport = connect_to(server.settings)  # type: ignore[attr-defined]
    with transport.open_stream("echo ready; exec cat", idle_timeout_s=LIMIT_S) as stream:
        assert read_exactly(stream, 6) == b"ready\n"
        outcome: list[BaseException | None] = []

        def run() -> None:
            try:
                transport.run("sleep 600", timeout_s=LIMIT_S)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)

        runner = threading.Thread(target=run)
        runner.start()
        server.kill_connections()  # type: ignore[attr-defined]
        with pytest.raises(ConnectionLostError):
            stream.read(1)
        with pytest.raises(ConnectionLostError):
            write_for_ever(stream)
        runner.join(LIMIT_S)
    assert isinstance(outcome[0], ConnectionLostError)
    assert not transport.is_alive()
    with pytest.raises(ConnectionLostError):
        transport.run("true", timeout_s=LIMIT_S)


def test_a_cut_link_is_a_lost_connection(connect_to: Connect, sshd: Sshd) -> None:
    relay = Relay(sshd.port)
    name = f"[127.0.0.1]:{relay.port}"
    known = sshd.known_hosts.with_name(f"known_hosts_{relay.port}")
    known.write_text(sshd.known_hosts.read_text().replace(f"[127.0.0.1]:{sshd.port}", name))
    transport = connect_to(sshd.settings(port=relay.port, known_hosts_files=(known,)))
    assert transport.is_alive()
    relay.cut()
    with pytest.raises(ConnectionLostError):
        transport.run("sleep 1", timeout_s=LIMIT_S)
    assert not transport.is_alive()


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_login_shells_that_talk_on_both_streams_change_nothing_but_add_noise(
    connect_to: Connect, sshd: Sshd, shell: str, tmp_path: Path
) -> None:
    path = find_program(shell)
    key = make_key(tmp_path / "key")
    sshd.authorise(key, login_shell_option(path, make_noisy_home(tmp_path / "home")))
    transport = connect_to(sshd.settings(identity_files=(key,)))
    text = 'it\'s $(odd) `text` "é" !x\n'
    result = transport.run(f"printf %s {shlex.quote(text)}; echo oops >&2; exit 255", timeout_s=LIMIT_S)
    assert result.exit_status == 255
    assert result.stdout.startswith(b"a banner\n")
    assert result.stdout.endswith(text.encode())
    assert result.stderr.startswith(b"a banner\n")
    assert result.stderr.endswith(b"oops\n")
    with transport.open_stream("echo; echo ready; exec cat", idle_timeout_s=LIMIT_S) as stream:
        seen = b""
        while not seen.endswith(b"\nready\n"):
            seen += stream.read(1)
        stream.write(EVERY_BYTE)
        stream.close_write()
        assert read_to_end(stream) == EVERY_BYTE


def test_the_description_names_user_host_and_port(transport: Transport, settings: ConnectionSettings) -> None:
    assert transport.description == f"{settings.user}@127.0.0.1:{settings.port}"
