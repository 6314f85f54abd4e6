"""Secrets that a server asks for: put to the person once, never tried twice, never told to anybody else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import LoginRefusedError
from orchestrator.ssh.settings import RetryPolicy
from orchestrator.ssh.transport import Transport
from tests.support.asking_server import Rules, asking_server
from tests.support.sshd import make_key

LIMIT_S = 60.0
PATIENT = RetryPolicy(patience_s=30.0)
Connect = Callable[..., Transport]


class Person:
    """Answers by what the question is about, and remembers what was asked."""

    def __init__(self, **answers: str | None) -> None:
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, text: str, echo: bool) -> str | None:
        self.asked.append((text, echo))
        for about, answer in self.answers.items():
            if about in text.lower():
                return answer
        raise AssertionError(f"nobody expected the question {text!r}")


def test_a_password_is_asked_for_once_and_opens_the_door(connect_to: Connect, tmp_path: Path) -> None:
    person = Person(password="s3cret word")
    with asking_server(tmp_path / "server", Rules(password="s3cret word")) as server:
        transport = connect_to(server.settings(), prompt=person)
        assert transport.run("echo in; exit 3", timeout_s=LIMIT_S).exit_status == 3
        assert [echo for _, echo in person.asked] == [False]
        processes = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, timeout=60)
        assert "s3cret word" not in processes.stdout
    for path in (tmp_path / "s").rglob("*") if (tmp_path / "s").exists() else ():
        assert not path.is_file() or b"s3cret word" not in path.read_bytes()


def test_a_wrong_password_is_sent_once_and_not_told(connect_to: Connect, tmp_path: Path) -> None:
    person = Person(password="mistyped-4711")
    with asking_server(tmp_path / "server", Rules(password="right")) as server:
        with pytest.raises(LoginRefusedError) as caught:
            connect_to(server.settings(), PATIENT, prompt=person)
        assert server.attempts.count("password") == 1
    assert len(person.asked) == 1
    assert "mistyped-4711" not in repr(caught.value.__dict__)


def test_a_one_time_code_is_asked_for_by_the_servers_own_words(connect_to: Connect, tmp_path: Path) -> None:
    person = Person(code="123456")
    with asking_server(tmp_path / "server", Rules(code="123456")) as server:
        assert connect_to(server.settings(), prompt=person).is_alive()
    assert len(person.asked) == 1
    assert "One-time code:" in person.asked[0][0]


def test_a_code_behind_a_key_needs_both(connect_to: Connect, tmp_path: Path) -> None:
    key, stranger = make_key(tmp_path / "key"), make_key(tmp_path / "stranger")
    person = Person(code="123456")
    with asking_server(tmp_path / "server", Rules(code="123456", key=key)) as server:
        assert connect_to(server.settings(key), prompt=person).is_alive()
        assert len(person.asked) == 1
        with pytest.raises(LoginRefusedError):
            connect_to(server.settings(stranger), PATIENT, prompt=person)
    assert len(person.asked) == 1


@pytest.mark.parametrize("rules", [Rules(password="x"), Rules(code="x")])
def test_without_a_terminal_nothing_is_sent_and_the_fix_is_told(
    connect_to: Connect, tmp_path: Path, rules: Rules
) -> None:
    with asking_server(tmp_path / "server", rules) as server:
        with pytest.raises(LoginRefusedError) as caught:
            connect_to(server.settings(), PATIENT, prompt=lambda text, echo: None)
        assert "password" not in server.attempts
        assert server.attempts.count("keyboard-interactive") <= 1
    assert "terminal" in str(caught.value) + caught.value.action


def test_the_environment_of_commands_holds_nothing_of_ours(connect_to: Connect, tmp_path: Path) -> None:
    with asking_server(tmp_path / "server", Rules(password="x")) as server:
        transport = connect_to(server.settings(), prompt=Person(password="x"))
        environment = transport.run("env", timeout_s=LIMIT_S).stdout.decode()
    ours = {line for line in environment.splitlines() if "ASKPASS" in line}
    assert ours <= {f"{k}={v}" for k, v in os.environ.items()}
