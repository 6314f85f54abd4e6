"""Names that become part of a path or of a page: each is checked here before anybody joins or prints it."""

from __future__ import annotations

import re

from remote_payload.wire.codec import WireError

_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}\Z")
_JOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_NONCE = re.compile(r"[0-9a-f]{32}\Z")
_SSH_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:-]{0,254}\Z")
_SSH_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}\Z")
_ARTIFACT_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,126}\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

FILE_DIGEST_PREFIX = "v1:"
_MAX_PARTS = 8
_MAX_PART_BYTES = 255
_OURS = ".remote-eval-"


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is one path component of the allowed form, else raise `WireError`."""
    return _check(_RUN_ID, run_id, "run id")


def check_job_name(name: str) -> str:
    """Return `name` if it can name a job and its artifact folder, else raise `WireError`."""
    return _check(_JOB_NAME, name, "job name")


def check_sha256(digest: str) -> str:
    """Return `digest` if it is 64 lower-case hex digits, else raise `WireError`."""
    return _check(_SHA256, digest, "sha256")


def check_nonce(nonce: str) -> str:
    """Return `nonce` if it is 32 lower-case hex digits, else raise `WireError`."""
    return _check(_NONCE, nonce, "nonce")


def check_ssh_host(host: str) -> str:
    """Return `host` if it is a name or an address, and neither an option nor a URL, else raise `WireError`."""
    return _check(_SSH_HOST, host, "host")


def check_ssh_user(user: str) -> str:
    """Return `user` if it is a plain login name, else raise `WireError`."""
    return _check(_SSH_USER, user, "login name")


def check_file_digest(digest: str) -> str:
    """Return `digest` if it has the form `v1:<sha256>`, else raise `WireError`."""
    if not digest.startswith(FILE_DIGEST_PREFIX):
        raise WireError(f"file digest {digest[:80]!r} does not start with {FILE_DIGEST_PREFIX!r}")
    _check(_SHA256, digest[len(FILE_DIGEST_PREFIX) :], "file digest")
    return digest


def check_artifact_path(path: str) -> str:
    """Return a node's relative artifact path if it can only lie inside the folder it is joined to.

    Parts are plain ASCII names that do not begin with a dot or a dash; at most 8 of them. Everything else raises
    `WireError`: a name from the node is never trusted as a path.
    """
    parts = path.split("/")
    if not 0 < len(parts) <= 8 or not all(_ARTIFACT_PART.match(p) for p in parts):
        raise WireError(f"artifact path {path[:120]!r} is not a plain relative path")
    return path


def check_member_path(path: str) -> str:
    """Return the relative path of a file in a user's folder if it can only lie inside the folder it is joined to.

    Parts may hold any printable text but a backslash, and begin with a dot; at most 8 of them. Else raises `WireError`.
    """
    parts = path.split("/")
    is_plain = all(part not in ("", ".", "..") and printable(part) == part and "\\" not in part for part in parts)
    is_short = len(parts) <= _MAX_PARTS and all(len(part.encode()) <= _MAX_PART_BYTES for part in parts if is_plain)
    if not is_plain or not is_short or {"\n", "\t"} & set(path) or any(part.startswith(_OURS) for part in parts):
        raise WireError(f"{printable(path)[:120]!r} is no plain relative path")
    return path


def printable(text: str) -> str:
    """`text` with control, escape and bidirectional-override characters made visible; newline and tab stay.

    What a node or a checkpoint wrote goes through here before it reaches a terminal.
    """
    return _CONTROL.sub(lambda m: f"\\x{ord(m.group()):02x}", text).encode("utf-8", "backslashreplace").decode()


def _check(pattern: re.Pattern[str], value: str, what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise WireError(f"{str(value)[:80]!r} is not a valid {what}")
    return value
