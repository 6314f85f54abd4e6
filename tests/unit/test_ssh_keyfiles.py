"""What private key files tell before anybody is asked, on keys that ssh-keygen made."""

from __future__ import annotations

from pathlib import Path

import paramiko
import pytest

from orchestrator.ssh.keyfiles import KeyProblem, KeyTrouble, load_key, look_at_key, private_key_facts
from tests.support.sshd import fingerprint, make_key

FORMATS = [("ed25519", ()), ("rsa", ()), ("ecdsa", ()), ("rsa", ("-m", "PEM")), ("rsa", ("-m", "PKCS8"))]


@pytest.mark.parametrize(("kind", "extra"), FORMATS)
@pytest.mark.parametrize("passphrase", ["", "open sesame ü"])
def test_every_format_is_read_and_its_lock_seen(
    tmp_path: Path, kind: str, extra: tuple[str, ...], passphrase: str
) -> None:
    path = make_key(tmp_path / "key", kind, passphrase, extra)
    facts, problem = look_at_key(path)
    assert problem is None
    assert facts is not None
    assert facts.encrypted is bool(passphrase)
    assert facts.public is not None
    assert facts.public.fingerprint == fingerprint(path)
    loaded = load_key(path, passphrase or None)
    assert isinstance(loaded, paramiko.PKey)
    assert loaded.can_sign()
    assert loaded.asbytes() == facts.public.blob
    if passphrase:
        wrong = load_key(path, "wrong")
        assert isinstance(wrong, KeyProblem)
        assert wrong.trouble is KeyTrouble.MISTYPED
        assert "wrong" not in wrong.words


def test_the_public_key_is_told_without_the_companion_file_where_the_format_allows(tmp_path: Path) -> None:
    path = make_key(tmp_path / "key", passphrase="x")
    print_before = fingerprint(path)
    (tmp_path / "key.pub").unlink()
    facts, _ = look_at_key(path)
    assert facts is not None
    assert facts.public is not None
    assert facts.public.fingerprint == print_before


def test_what_cannot_be_offered_is_named_by_its_reason(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    key.chmod(0o640)
    text = tmp_path / "text"
    text.write_text("hello")
    text.chmod(0o600)
    expected = {
        key: KeyTrouble.PERMISSIONS,
        text: KeyTrouble.NOT_A_KEY,
        tmp_path: KeyTrouble.NOT_A_KEY,
        tmp_path / "none": KeyTrouble.MISSING,
        text / "below": KeyTrouble.MISSING,
    }
    for path, trouble in expected.items():
        facts, problem = look_at_key(path)
        assert facts is None
        assert problem is not None
        assert problem.trouble is trouble


@pytest.mark.parametrize("cut", [0, 40, 60, 100, 200, 300])
def test_a_truncated_key_is_no_key_and_no_crash(tmp_path: Path, cut: int) -> None:
    data = make_key(tmp_path / "key").read_bytes()
    facts = private_key_facts(data[:cut])
    assert facts is None
    facts = private_key_facts(data[:cut] + b"\n-----END OPENSSH PRIVATE KEY-----\n")
    assert facts is None or not facts.encrypted
    broken = tmp_path / "broken"
    broken.write_bytes(data[:cut])
    broken.chmod(0o600)
    assert isinstance(load_key(broken, None), KeyProblem)
