"""Private key files: what can be told without a passphrase, and reading them for paramiko.

OpenSSH's own format carries the public key in clear, so whether the agent holds the same key, whether it is a security
key, and whether a passphrase is needed are known before anybody is asked.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.ssh.known_hosts import PublicHostKey

if TYPE_CHECKING:
    import paramiko

_ARMOUR = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----\s*(.*?)-----END", re.DOTALL)
_OPENSSH_MAGIC = b"openssh-key-v1\0"
_MAX_KEY_BYTES = 1024 * 1024


class KeyTrouble(enum.Enum):
    """Why a configured key could not be offered."""

    MISSING = "there is no such file"
    PERMISSIONS = "others may read it, so it is not used"
    UNREADABLE = "it cannot be read"
    NOT_A_KEY = "it is no private key"
    UNSUPPORTED = "its kind is one that paramiko cannot use"
    LOCKED = "it is encrypted, and there was no passphrase for it"
    MISTYPED = "the passphrase does not open it"
    SIGNING_FAILED = "the agent did not sign with it"


@dataclasses.dataclass(frozen=True)
class KeyProblem:
    """A key that was not offered."""

    path: str
    trouble: KeyTrouble
    words: str = ""


@dataclasses.dataclass(frozen=True)
class PrivateKeyFacts:
    """What a private key file tells without its passphrase. `public` is None where the format hides it."""

    encrypted: bool
    public: PublicHostKey | None = None


def private_key_facts(data: bytes) -> PrivateKeyFacts | None:
    """Facts of a private key in OpenSSH's or a PEM format; None for what is neither."""
    match = _ARMOUR.search(data)
    if match is None:
        return None
    kind, body = match.group(1).strip(), match.group(2)
    if kind != b"OPENSSH":
        return PrivateKeyFacts(encrypted=kind == b"ENCRYPTED" or b"ENCRYPTED" in body.split(b"\n\n")[0])
    try:
        return _openssh_facts(base64.b64decode(body))
    except (binascii.Error, struct.error, ValueError):
        return None


def public_key_file(path: Path) -> PublicHostKey | None:
    """The public key beside a private one (`path` + `.pub`), if there is one."""
    try:
        fields = path.with_name(path.name + ".pub").read_text("utf-8", "replace").split()
        return PublicHostKey(fields[0], base64.b64decode(fields[1], validate=True))
    except (OSError, IndexError, binascii.Error, ValueError):
        return None


def look_at_key(path: Path) -> tuple[PrivateKeyFacts | None, KeyProblem | None]:
    """Facts of the private key at `path`, or why it cannot be offered."""
    try:
        status = path.stat()
        if status.st_size > _MAX_KEY_BYTES or not stat.S_ISREG(status.st_mode):
            return None, KeyProblem(str(path), KeyTrouble.NOT_A_KEY)
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, KeyProblem(str(path), KeyTrouble.MISSING)
    except OSError as error:
        return None, KeyProblem(str(path), KeyTrouble.UNREADABLE, error.strerror or "")
    if status.st_mode & 0o077:
        return None, KeyProblem(str(path), KeyTrouble.PERMISSIONS, stat.filemode(status.st_mode))
    facts = private_key_facts(data)
    if facts is None:
        return None, KeyProblem(str(path), KeyTrouble.NOT_A_KEY)
    if facts.public is None:
        facts = dataclasses.replace(facts, public=public_key_file(path))
    return facts, None


def load_key(path: Path, passphrase: str | None) -> paramiko.PKey | KeyProblem:
    """The key at `path` for paramiko.

    It goes through `cryptography`, which reads every format, and on to paramiko in OpenSSH's: paramiko itself knows no
    PKCS#8 and takes guesses at the type.
    """
    import io

    import paramiko
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    secret = passphrase.encode() if passphrase is not None else None
    try:
        data = path.read_bytes()
        is_openssh = b"BEGIN OPENSSH" in data
        load = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
        key = load(data, secret)
    except (ValueError, TypeError) as error:
        trouble = KeyTrouble.NOT_A_KEY if secret is None else KeyTrouble.MISTYPED
        return KeyProblem(str(path), trouble, str(error))
    except UnsupportedAlgorithm as error:
        return KeyProblem(str(path), KeyTrouble.UNSUPPORTED, str(error))
    except OSError as error:
        return KeyProblem(str(path), KeyTrouble.UNREADABLE, error.strerror or "")
    kinds: tuple[tuple[type, type[paramiko.PKey]], ...] = (
        (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
        (rsa.RSAPrivateKey, paramiko.RSAKey),
        (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
    )
    for theirs, ours in kinds:
        if isinstance(key, theirs):
            plain = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
            return ours.from_private_key(io.StringIO(plain.decode()))
    return KeyProblem(str(path), KeyTrouble.UNSUPPORTED, type(key).__name__)


def _openssh_facts(raw: bytes) -> PrivateKeyFacts:
    if not raw.startswith(_OPENSSH_MAGIC):
        raise ValueError("no OpenSSH key")
    offset = len(_OPENSSH_MAGIC)
    cipher, offset = _string(raw, offset)
    _, offset = _string(raw, offset)
    _, offset = _string(raw, offset)
    (count,) = struct.unpack_from(">I", raw, offset)
    if count < 1:
        raise ValueError("an OpenSSH key file without a key")
    blob, _ = _string(raw, offset + 4)
    key_type, _ = _string(blob, 0)
    return PrivateKeyFacts(cipher != b"none", PublicHostKey(key_type.decode("ascii", "replace"), blob))


def _string(raw: bytes, offset: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from(">I", raw, offset)
    end = offset + 4 + length
    if end > len(raw):
        raise ValueError("truncated")
    return raw[offset + 4 : end], end
