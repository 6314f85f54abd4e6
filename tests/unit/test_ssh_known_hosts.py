"""What known_hosts files say, with ssh-keygen as the oracle."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.ssh.known_hosts import (
    HostKeyVerdict,
    PublicHostKey,
    has_certificate_authority,
    host_name_in_file,
    judge,
    known_hosts_line,
    known_key_types,
    parse_known_hosts,
    read_known_hosts,
)
from tests.support.sshd import fingerprint, make_key

A, B = PublicHostKey("ssh-ed25519", b"key a"), PublicHostKey("ssh-ed25519", b"key b")
R = PublicHostKey("ssh-rsa", b"key r")


def line(name: str, key: PublicHostKey) -> str:
    return known_hosts_line(name, key, hashed=False).strip()


@pytest.mark.parametrize(
    ("host", "port", "alias", "expected"),
    [
        ("Node.Example", 22, None, "node.example"),
        ("node", 2222, None, "[node]:2222"),
        ("::1", 22, None, "::1"),
        ("::1", 2222, None, "[::1]:2222"),
        ("node", 2222, "Alias", "alias"),
    ],
)
def test_a_host_is_looked_up_under_the_name_that_openssh_uses(
    host: str, port: int, alias: str | None, expected: str
) -> None:
    assert host_name_in_file(host, port, alias) == expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("node", "node", True),
        ("node", "node2", False),
        ("*.example,!bad.example", "good.example", True),
        ("*.example,!bad.example", "bad.example", False),
        ("!bad.example,*.example", "bad.example", False),
        ("n?de", "node", True),
        ("[127.0.0.1]:*", "[127.0.0.1]:4711", True),
        ("[127.0.0.1]:*", "1]:4711", False),
        ("[ab]", "a", False),
        ("NODE", "node", True),
    ],
)
def test_patterns_mean_what_they_mean_to_openssh(pattern: str, name: str, expected: bool) -> None:
    (entry,) = parse_known_hosts(line(pattern, A), "f")
    assert entry.matches(name) is expected


def test_known_unknown_changed_and_revoked_are_told_apart() -> None:
    known = parse_known_hosts("\n".join([line("h", A), line("h", R), "@revoked " + line("*", B)]), "f")
    assert judge(known, "h", A).verdict is HostKeyVerdict.KNOWN
    assert judge(known, "h", PublicHostKey("ssh-ed25519", b"new")).verdict is HostKeyVerdict.CHANGED
    assert judge(known, "other", A).verdict is HostKeyVerdict.UNKNOWN
    assert judge(known, "h", B).verdict is HostKeyVerdict.REVOKED
    assert judge(known, "other", B).verdict is HostKeyVerdict.REVOKED
    assert judge((), "h", A).verdict is HostKeyVerdict.UNKNOWN


def test_a_changed_key_comes_with_the_lines_that_say_so() -> None:
    known = parse_known_hosts("# comment\n\n" + line("h", A) + "\n", "/k")
    assert [(x.file, x.line) for x in judge(known, "h", B).lines] == [("/k", 3)]


def test_the_plain_hosts_key_counts_for_another_port_only_where_nothing_else_is_written() -> None:
    plain = parse_known_hosts(line("h", A), "f")
    assert judge(plain, "[h]:2222", A, 2222).verdict is HostKeyVerdict.KNOWN
    assert judge(plain, "[h]:2222", B, 2222).verdict is HostKeyVerdict.UNKNOWN
    both = parse_known_hosts(line("h", A) + "\n" + line("[h]:2222", B), "f")
    assert judge(both, "[h]:2222", A, 2222).verdict is HostKeyVerdict.CHANGED
    assert judge(both, "h", B).verdict is HostKeyVerdict.CHANGED


def test_a_certificate_authoritys_key_is_no_host_key() -> None:
    known = parse_known_hosts("@cert-authority " + line("*.example", A), "f")
    assert judge(known, "x.example", A).verdict is HostKeyVerdict.UNKNOWN
    assert has_certificate_authority(known, "x.example")
    assert not has_certificate_authority(known, "x.elsewhere")


def test_known_types_are_told_once_each_in_order() -> None:
    known = parse_known_hosts("\n".join([line("h", R), line("h", A), line("x", B), line("h", B)]), "f")
    assert known_key_types(known, "h") == ("ssh-rsa", "ssh-ed25519")
    assert known_key_types(known, "[h]:99", 99) == ("ssh-rsa", "ssh-ed25519")


@pytest.mark.parametrize(
    "damage", ["", "   ", "#x", "h", "h ssh-rsa", "h ssh-rsa !!!", "|1|bad h h", "@x", "\x00 \x00"]
)
def test_damaged_lines_are_passed_over(damage: str) -> None:
    known = parse_known_hosts(f"{damage}\n{line('h', A)}\n", "f")
    assert judge(known, "h", A).verdict is HostKeyVerdict.KNOWN
    assert judge(known, "g", A).verdict is HostKeyVerdict.UNKNOWN


def test_a_line_of_ours_is_found_by_ssh_keygen_and_the_other_way_round(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    key_type, text = (tmp_path / "key.pub").read_text().split()[:2]
    import base64

    ours = PublicHostKey(key_type, base64.b64decode(text))
    assert ours.fingerprint == fingerprint(key)
    file = tmp_path / "known_hosts"
    file.write_text(known_hosts_line("[node]:2222", ours, hashed=True))
    assert "node" not in file.read_text()
    found = subprocess.run(
        ["ssh-keygen", "-F", "[node]:2222", "-f", str(file)], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0
    file.write_text(known_hosts_line("[node]:2222", ours, hashed=False))
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, capture_output=True, timeout=60)
    assert judge(read_known_hosts([file]), "[node]:2222", ours, 2222).verdict is HostKeyVerdict.KNOWN
    assert read_known_hosts([tmp_path / "none", file / "below"]) == ()
