"""The payload: all of `remote_payload` as one zipapp, the same bytes wherever and whenever it is built."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import remote_payload
from orchestrator.errors import UsageError
from orchestrator.fsutil import write_atomically
from orchestrator.layout import LocalLayout
from remote_payload.wire import PROTOCOL_VERSION
from remote_payload.wire.names import check_sha256

_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644

_MAIN = '''\
"""Entry of the zipapp. Any Python can read this much, so that one that is too old says so instead of failing."""

import sys


def refuse():
    message = "the node's Python %d.%d is older than 3.9" % sys.version_info[:2]
    action = "Name a newer Python in the profile's python section (path, conda_env or modules)."
    try:
        import base64
        import json

        text = sys.argv[3] if sys.argv[3] != "-" else sys.stdin.read()
        nonce = str(json.loads(base64.b64decode(text).decode("ascii"))["nonce"])
        if not nonce.isalnum():
            raise ValueError(nonce)
        failure = {"kind": "unfit", "message": message, "action": action, "detail": sys.executable}
        body = base64.b64encode(json.dumps({"error": failure}).encode("ascii")).decode("ascii")
        head = "\\n=remote-eval=%s=PROTOCOL=%d=\\n" % (nonce, len(body))
        sys.stdout.write(head + body + "\\n=end=%s=\\n" % nonce)
        sys.stdout.flush()
        return 0
    except (IndexError, KeyError, TypeError, ValueError):
        sys.stderr.write(message + "\\n")
        return 2


def use_bytecode():
    from importlib.util import MAGIC_NUMBER

    # What `remote_payload.agent.bytecode` made; where it is missing or no archive, the import goes on to the next.
    sys.path.insert(0, "%s.%s" % (sys.path[0], MAGIC_NUMBER.hex()))


if __name__ == "__main__":
    if sys.version_info < (3, 9):
        sys.exit(refuse())
    use_bytecode()
    from remote_payload.__main__ import main

    sys.exit(main())
'''.replace("PROTOCOL", str(PROTOCOL_VERSION))


@dataclasses.dataclass(frozen=True)
class Payload:
    """A built payload on this machine. `size` in bytes."""

    path: Path
    sha256: str
    size: int


def build_payload(layout: LocalLayout) -> Payload:
    """The payload of the installed code, in the cache under its own digest."""
    return _cache(payload_bytes(), layout)


def payload_for(sha256: str, layout: LocalLayout) -> Payload:
    """The payload that a run was planned with: from the cache, or built where the installed code still makes it.

    Raises `UsageError` when neither has it.
    """
    path = _cached_path(sha256, layout)
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return Payload(path, sha256, len(data))
    payload = build_payload(layout)
    if payload.sha256 != sha256:
        raise UsageError(
            "the run was planned with another version of remote-eval, whose payload is no longer in the cache",
            action="Go back to that version to resume it, or start a new run.",
        )
    return payload


def payload_bytes() -> bytes:
    """The zipapp: sorted, uncompressed, with fixed times and modes, without anything that Python or an editor left."""
    entries = dict(_files(Path(next(iter(remote_payload.__path__))), "remote_payload"))
    entries["__main__.py"] = _MAIN.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, _TIMESTAMP)
            info.create_system = 3
            info.external_attr = (0o100000 | _MODE) << 16
            archive.writestr(info, entries[name])
    return buffer.getvalue()


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "__pycache__")) or entry.name.endswith((".pyc", ".pyo", "~")):
            continue
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _files(entry, name)
        else:
            yield name, entry.read_bytes()


def _cache(data: bytes, layout: LocalLayout) -> Payload:
    sha256 = hashlib.sha256(data).hexdigest()
    path = _cached_path(sha256, layout)
    if not path.is_file() or path.read_bytes() != data:
        layout.make_private(layout.payloads)
        write_atomically(path, data)
    return Payload(path, sha256, len(data))


def _cached_path(sha256: str, layout: LocalLayout) -> Path:
    return layout.payloads / f"{check_sha256(sha256)}.pyz"
