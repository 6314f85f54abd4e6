"""Scripts, bounds, retries and the mapping of foreign exceptions: the small pure parts of SSH."""

from __future__ import annotations

import errno
import socket
import subprocess
import time

import paramiko
import pytest

from orchestrator.errors import (
    CommandTimeoutError,
    ConfigurationError,
    ConnectionLostError,
    HostKeyError,
    InternalError,
    LoginRefusedError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.ssh.bounded import BoundedBytes
from orchestrator.ssh.connect import OncePrompt
from orchestrator.ssh.foreign_errors import mapped, under_way, while_connecting
from orchestrator.ssh.retry import with_retry
from orchestrator.ssh.scripts import marked_command, script_bytes, split_mark, stream_script_bytes
from orchestrator.ssh.settings import RetryNotice, RetryPolicy

NONCE = "0123456789abcdef"


def sh(data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["/bin/sh"], input=data, capture_output=True, timeout=60)


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize(
    "script", ["cat; exit 3", "cat\nexit 3 # the end", "cat; exit 3\n\n", "(cat; exit 3)", "cat; sh -c 'exit 3'"]
)
def test_a_script_keeps_its_status_and_finds_no_input(shell: str, script: str) -> None:
    done = subprocess.run([shell], input=script_bytes(script), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"")


@pytest.mark.parametrize("script", ["echo a \\", "cat <<'X'\nbody\nX", "# only a comment", "", "true;", "f() { :; }"])
def test_scripts_of_odd_ends_still_parse(script: str) -> None:
    assert sh(script_bytes(script)).returncode == 0


def test_a_script_that_was_cut_on_its_way_runs_nothing() -> None:
    whole = script_bytes("echo first\nexit 7\n")
    for length in range(len(whole) - 14):
        assert sh(whole[:length]).stdout == b"", whole[:length]


def test_a_stream_script_leaves_every_byte_behind_it_to_its_program() -> None:
    data = b"exit $?\n}\necho not for the shell\n"
    assert sh(stream_script_bytes("cat") + data).stdout in (data, b"")  # a shell may read ahead before `ready`


@pytest.mark.parametrize("status", [0, 1, 254, 255])
def test_a_status_of_255_is_told_from_a_failure_of_the_client(status: int) -> None:
    done = subprocess.run(
        marked_command(NONCE),
        shell=True,
        input=f"echo err >&2; exit {status}".encode(),
        capture_output=True,
        timeout=60,
    )
    assert split_mark(NONCE, done.returncode, done.stderr) == (status, b"err\n")


def test_255_without_the_mark_is_the_clients_and_another_nonces_mark_is_output() -> None:
    assert split_mark(NONCE, 255, b"words") == (None, b"words")
    assert split_mark(NONCE, 255, b"=ffff=255=\n") == (None, b"=ffff=255=\n")
    assert split_mark(NONCE, 255, b"a" + f"={NONCE}=255=\n".encode() + b"late") == (255, b"alate")


def test_output_is_kept_up_to_its_bound_and_counted_beyond() -> None:
    kept = BoundedBytes(5)
    for part in (b"abc", b"def", b"ghi"):
        kept.add(part)
    assert (kept.value(), kept.dropped_bytes) == (b"abcde", 4)


def test_network_trouble_is_retried_with_growing_waits_until_it_ends() -> None:
    notices: list[RetryNotice] = []
    waits: list[float] = []
    left = 6

    def attempt() -> str:
        nonlocal left
        left -= 1
        if left:
            raise UnreachableError(f"trouble {left}")
        return "in"

    policy = RetryPolicy(patience_s=1000.0, first_wait_s=1.0, longest_wait_s=6.0)
    assert with_retry(attempt, policy, notices.append, sleep=waits.append) == "in"
    assert [n.reason for n in notices] == [f"trouble {i}" for i in (5, 4, 3, 2, 1)]
    assert [n.attempt for n in notices] == [1, 2, 3, 4, 5]
    assert waits == [n.wait_s for n in notices]
    for wait, step in zip(waits, (1.0, 2.0, 4.0, 6.0, 6.0), strict=True):
        assert step / 2 <= wait <= step
    assert all(0 < n.patience_left_s <= 1000.0 for n in notices)


@pytest.mark.parametrize(
    "error", [LoginRefusedError("no"), HostKeyError("no"), ConfigurationError("no"), ValueError("no")]
)
def test_anything_but_network_trouble_ends_at_once(error: Exception) -> None:
    calls: list[int] = []

    def attempt() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        with_retry(attempt, RetryPolicy(1000.0), sleep=lambda s: pytest.fail("waited"))
    assert caught.value is error
    assert calls == [1]


def test_the_patience_bounds_the_waits_and_the_last_error_is_the_one_raised() -> None:
    waits: list[float] = []

    def attempt() -> None:
        raise UnreachableError("still")

    began = time.monotonic()
    with pytest.raises(UnreachableError, match="still"):
        with_retry(
            attempt,
            RetryPolicy(patience_s=0.3, first_wait_s=0.05, longest_wait_s=0.1),
            sleep=lambda s: (waits.append(s), time.sleep(s))[1],
        )
    assert sum(waits) <= time.monotonic() - began
    with pytest.raises(UnreachableError):
        with_retry(attempt, RetryPolicy(patience_s=0.0), sleep=lambda s: pytest.fail("waited"))


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), UnreachableError, "no name server"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), UnreachableError, "could not be looked up"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), UnreachableError, "refuses"),
        (TimeoutError("x"), UnreachableError, "in time"),
        (OSError(errno.ETIMEDOUT, "x"), UnreachableError, "in time"),
        (OSError(errno.EHOSTUNREACH, "x"), UnreachableError, "no route"),
        (OSError(errno.ENETUNREACH, "x"), UnreachableError, "no route"),
        (ConnectionResetError(errno.ECONNRESET, "x"), UnreachableError, "closed the connection"),
        (EOFError(), UnreachableError, "closed the connection"),
        (paramiko.SSHException("banner"), UnreachableError, "closed the connection"),
        (paramiko.ssh_exception.IncompatiblePeer("kex"), ConfigurationError, "algorithm"),
        (
            paramiko.ssh_exception.NoValidConnectionsError({("h", 1): ConnectionRefusedError(errno.ECONNREFUSED, "x")}),
            UnreachableError,
            "refuses",
        ),
        (ZeroDivisionError(), InternalError, "unexpected"),
    ],
)
def test_connecting_maps_each_foreign_exception_to_its_own_cause(
    error: Exception, expected: type[RemoteEvalError], words: str
) -> None:
    ours = while_connecting(error, "u@h:22")
    assert type(ours) is expected
    assert words in str(ours)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), CommandTimeoutError),
        (BrokenPipeError(), ConnectionLostError),
        (EOFError(), ConnectionLostError),
        (paramiko.SSHException("x"), ConnectionLostError),
        (KeyError("x"), InternalError),
    ],
)
def test_under_way_a_foreign_exception_is_lost_contact_or_our_own_mistake(
    error: Exception, expected: type[RemoteEvalError]
) -> None:
    assert type(under_way(error, "u@h:22", "x")) is expected
    with pytest.raises(expected) as caught, mapped("u@h:22", "x"):
        raise error
    assert caught.value.__cause__ is error


def test_our_own_errors_pass_through_as_they_are() -> None:
    error = HostKeyError("x")
    assert while_connecting(error, "h") is error
    with pytest.raises(HostKeyError) as caught, mapped("h", "x"):
        raise error
    assert caught.value is error


def test_a_question_is_put_once_whatever_the_answer() -> None:
    asked: list[str] = []

    def person(text: str, echo: bool) -> str | None:
        asked.append(text)
        return None if text == "b" else text.upper()

    prompt = OncePrompt(person)
    assert [prompt(t, False) for t in "abab"] == ["A", None, "A", None]
    assert asked == ["a", "b"]
    assert OncePrompt(None)("a", True) is None
