"""Recorded words of OpenSSH's client, and the errors they become."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import (
    AuthenticationError,
    ConfigurationError,
    HostKeyError,
    InternalError,
    LoginRefusedError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.known_hosts import parse_known_hosts
from orchestrator.ssh.openssh_messages import login_failure

EFFECTIVE = EffectiveConfig("node", "node.example", "alice", 22, user_known_hosts=(Path("/kh"),))
SHOWN = "debug1: Server host key: ssh-ed25519 SHA256:xyz\n"
OFFERED = (
    "debug1: Authentications that can continue: publickey,password\n"
    "debug1: Offering public key: /home/a/.ssh/id_rsa RSA SHA256:aaa explicit\n"
    "debug1: Authentications that can continue: publickey,password\n"
)


@pytest.mark.parametrize(
    ("text", "expected", "words"),
    [
        ("ssh: Could not resolve hostname node: Name or service not known", UnreachableError, "no name server"),
        ("ssh: connect to host node port 22: Connection refused", UnreachableError, "refuses"),
        ("ssh: connect to host node port 22: Connection timed out", UnreachableError, "in time"),
        ("ssh: connect to host node port 22: Operation timed out", UnreachableError, "in time"),
        (
            "Connection timed out during banner exchange\nConnection to 1.2.3.4 port 22 timed out",
            UnreachableError,
            "in time",
        ),
        ("ssh: connect to host node port 22: No route to host", UnreachableError, "no route"),
        ("ssh: connect to host node port 22: Network is unreachable", UnreachableError, "no route"),
        (
            "kex_exchange_identification: Connection closed by remote host\nConnection closed by 1.2.3.4 port 22",
            UnreachableError,
            "before the login",
        ),
        (
            "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 1.2.3.4 port 22",
            UnreachableError,
            "before the login",
        ),
        (
            "ssh_exchange_identification: Connection closed by remote host\nConnection closed by 1.2.3.4",
            UnreachableError,
            "before the login",
        ),
        (OFFERED + "alice@node: Permission denied (publickey,password).", LoginRefusedError, "refused 1 key"),
        (
            OFFERED + "Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures\n"
            "Disconnected from 1.2.3.4 port 22",
            LoginRefusedError,
            "MaxAuthTries",
        ),
        (OFFERED + "Connection closed by 1.2.3.4 port 22", UnreachableError, "before the login"),
        ("/home/a/.ssh/config: line 3: Bad configuration option: foo", ConfigurationError, "configuration"),
        ("Bad owner or permissions on /home/a/.ssh/config", ConfigurationError, "configuration"),
        ("Unable to negotiate with 1.2.3.4 port 22: no matching host key type found.", ConfigurationError, "algorithm"),
        ('unix_listener: path "/x" too long for Unix domain socket', InternalError, "control socket"),
        ("Something new that nobody has seen", AuthenticationError, "did not log in"),
        ("", AuthenticationError, "did not log in"),
        ("Host key verification failed.", HostKeyError, "on the way"),
    ],
)
def test_each_message_becomes_its_own_cause(text: str, expected: type[RemoteEvalError], words: str) -> None:
    error = login_failure(text, EFFECTIVE, ())
    assert type(error) is expected
    assert words in str(error)
    assert "debug1" not in error.details


def test_an_unknown_and_a_changed_host_key_are_told_by_the_files_not_by_the_words() -> None:
    unknown = login_failure(SHOWN + "Host key verification failed.", EFFECTIVE, ())
    assert isinstance(unknown, HostKeyError)
    assert "is not known: ssh-ed25519 SHA256:xyz" in str(unknown)
    assert "ssh-keyscan node.example >> /kh" in unknown.action
    known = parse_known_hosts("node.example ssh-ed25519 AAAA\n", "/kh")
    changed = login_failure(SHOWN + "Host key verification failed.", EFFECTIVE, known)
    assert "has changed" in str(changed)
    assert "/kh:1" in str(changed)


def test_a_first_step_that_was_taken_is_told_from_a_refusal() -> None:
    text = (
        OFFERED + 'Authenticated using "publickey" with partial success.\n'
        "debug1: Authentications that can continue: keyboard-interactive\n"
        "alice@node: Permission denied (keyboard-interactive)."
    )
    error = login_failure(text, EFFECTIVE, ())
    assert isinstance(error, LoginRefusedError)
    assert "first step" in str(error)
    assert "keyboard-interactive" in str(error)


def test_key_files_that_were_not_usable_are_named_with_the_fix() -> None:
    text = (
        "debug1: Authentications that can continue: publickey\n"
        "Permissions 0644 for '/home/a/key' are too open.\n"
        'Load key "/home/a/key": bad permissions\n'
        "alice@node: Permission denied (publickey)."
    )
    error = login_failure(text, EFFECTIVE, ())
    assert "chmod 600 /home/a/key" in error.action


def test_the_clients_words_are_in_the_details() -> None:
    banner = "*** Authorised users only ***"
    assert banner in login_failure(f"{banner}\n{OFFERED}a@b: Permission denied (publickey).", EFFECTIVE, ()).details
