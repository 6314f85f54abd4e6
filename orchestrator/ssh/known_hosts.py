"""What OpenSSH's known_hosts files say about a host: parsing and judging, pure.

Patterns, negation, hashed names, `[host]:port`, `@revoked` and `@cert-authority` have OpenSSH's meaning. paramiko's own
reader knows neither patterns nor markers, and forgets the line that a key came from.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import fnmatch
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence

SSH_PORT = 22
_HASH_MARK = "|1|"
_HASH_BYTES = 20


@dataclasses.dataclass(frozen=True)
class PublicHostKey:
    """A host key as it is offered or written down. `blob` is the wire form."""

    key_type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: `SHA256:` and unpadded base64."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.key_type} {self.fingerprint}"


@dataclasses.dataclass(frozen=True)
class KnownHost:
    """One line of a known_hosts file."""

    file: str
    line: int
    marker: str
    patterns: tuple[str, ...]
    key: PublicHostKey

    def matches(self, name: str) -> bool:
        """Whether this line speaks of `name`; a negated pattern that matches rules the line out."""
        found = False
        for pattern in self.patterns:
            negated = pattern.startswith("!")
            if _pattern_matches(pattern.removeprefix("!"), name):
                if negated:
                    return False
                found = True
        return found


class HostKeyVerdict(enum.Enum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`lines` are those the verdict rests on: the known key, or the other keys that are written down for the name."""

    verdict: HostKeyVerdict
    lines: tuple[KnownHost, ...] = ()


def host_name_in_file(host: str, port: int, alias: str | None) -> str:
    """The name under which OpenSSH looks a host up; a HostKeyAlias stands alone, without the port."""
    if alias:
        return alias.lower()
    return host.lower() if port == SSH_PORT else f"[{host.lower()}]:{port}"


def parse_known_hosts(text: str, file: str) -> tuple[KnownHost, ...]:
    """Every usable line; those that cannot be read are passed over, as OpenSSH does."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        marker = fields.pop(0) if fields[0].startswith("@") else ""
        if len(fields) < 3:
            continue
        try:
            blob = base64.b64decode(fields[2], validate=True)
        except (binascii.Error, ValueError):
            continue
        patterns = tuple(p if p.startswith(_HASH_MARK) else p.lower() for p in fields[0].split(",") if p)
        found.append(KnownHost(file, number, marker, patterns, PublicHostKey(fields[1], blob)))
    return tuple(found)


def judge(lines: Iterable[KnownHost], name: str, key: PublicHostKey, port: int = SSH_PORT) -> Judgement:
    """What the files say of `key` for `name` (from `host_name_in_file`).

    A key known for the plain host is taken for `[host]:port` too while nothing is written down for that; a host of
    which only keys of other types are known counts as changed.
    """
    lines = tuple(lines)
    about = [line for line in lines if line.matches(name)]
    plain = [] if port == SSH_PORT else [line for line in lines if line.matches(_without_port(name))]
    revoked = tuple(x for x in (*about, *plain) if x.marker == "@revoked" and x.key.blob == key.blob)
    if revoked:
        return Judgement(HostKeyVerdict.REVOKED, revoked)
    about = [line for line in about if not line.marker]
    same = tuple(line for line in about if line.key.blob == key.blob)
    if same:
        return Judgement(HostKeyVerdict.KNOWN, same)
    if about:
        return Judgement(HostKeyVerdict.CHANGED, tuple(about))
    same = tuple(line for line in plain if not line.marker and line.key.blob == key.blob)
    return Judgement(HostKeyVerdict.KNOWN if same else HostKeyVerdict.UNKNOWN, same)


def known_key_types(lines: Iterable[KnownHost], name: str, port: int = SSH_PORT) -> tuple[str, ...]:
    """Types of the keys written down for the host; asking for these first avoids a key that nobody has compared."""
    names = {name, _without_port(name)} if port != SSH_PORT else {name}
    found = [line.key.key_type for line in lines if not line.marker and any(line.matches(n) for n in names)]
    return tuple(dict.fromkeys(found))


def has_certificate_authority(lines: Iterable[KnownHost], name: str) -> bool:
    """Whether the host's key may be vouched for by a certificate authority, which only OpenSSH checks."""
    return any(line.marker == "@cert-authority" and line.matches(name) for line in lines)


def known_hosts_line(name: str, key: PublicHostKey, *, hashed: bool) -> str:
    """The line that makes `key` known for `name`, with its newline."""
    written = name
    if hashed:
        salt = os.urandom(_HASH_BYTES)
        written = f"{_HASH_MARK}{base64.b64encode(salt).decode()}|{base64.b64encode(_hash(salt, name)).decode()}"
    return f"{written} {key.key_type} {base64.b64encode(key.blob).decode()}\n"


def read_known_hosts(files: Sequence[str | os.PathLike[str]]) -> tuple[KnownHost, ...]:
    """All lines of `files` in order; a file that is not there holds none. Raises `OSError` for an unreadable one."""
    found: list[KnownHost] = []
    for file in files:
        try:
            with open(file, encoding="utf-8", errors="replace") as opened:  # noqa: PTH123  (plain str paths)
                found.extend(parse_known_hosts(opened.read(), os.fspath(file)))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return tuple(found)


def _without_port(name: str) -> str:
    match = re.fullmatch(r"\[(.+)\]:\d+", name)
    return match.group(1) if match else name


def _pattern_matches(pattern: str, name: str) -> bool:
    if pattern.startswith(_HASH_MARK):
        return _hashed_matches(pattern, name)
    # fnmatch gives [ a meaning that it does not have here.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def _hashed_matches(pattern: str, name: str) -> bool:
    try:
        salt, wanted = (base64.b64decode(part, validate=True) for part in pattern[len(_HASH_MARK) :].split("|"))
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(_hash(salt, name), wanted)


def _hash(salt: bytes, name: str) -> bytes:
    return hmac.new(salt, name.encode(), hashlib.sha1).digest()
