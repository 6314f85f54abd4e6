"""The embedded node's folder: keys, locks and the state of the running server. The one owner of its paths."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from orchestrator.errors import InternalError
from orchestrator.fsutil import write_atomically
from remote_payload.wire.codec import WireError, from_json, to_json

_POLL_S = 0.05
_LONGEST_LOG_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ServerState:
    """What the running server says of itself. `token` is new with every start."""

    pid: int
    port: int
    token: str


@dataclasses.dataclass(frozen=True)
class EmbeddedFiles:
    """Paths in the embedded node's folder, and what is done with them."""

    folder: Path

    @property
    def host_key(self) -> Path:
        return self.folder / "host_key"

    @property
    def client_key(self) -> Path:
        return self.folder / "client_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def state(self) -> Path:
        return self.folder / "server.json"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def server_lock(self) -> Path:
        """Held by the server as long as it lives: whoever can take it knows that there is none."""
        return self.folder / "server.lock"

    @property
    def start_lock(self) -> Path:
        return self.folder / "start.lock"

    def prepare(self) -> None:
        """Make what is missing of keys and known_hosts. Only within `locked`."""
        for path in (self.host_key, self.client_key):
            if not path.exists():
                _make_key(path)
        public = self.host_key.with_suffix(".pub").read_text("ascii").strip()
        # The port changes with every start; the key does not.
        line = f"[127.0.0.1]:* {public}\n"
        if not self.known_hosts.exists() or self.known_hosts.read_text("ascii") != line:
            write_atomically(self.known_hosts, line.encode())

    def read_state(self) -> ServerState | None:
        """What the last server wrote; it is true only while that server lives (see `server_is_alive`)."""
        try:
            return from_json(ServerState, json.loads(self.state.read_bytes()))
        except (FileNotFoundError, ValueError, WireError):
            return None

    def write_state(self, state: ServerState) -> None:
        write_atomically(self.state, json.dumps(to_json(state)).encode())

    def open_log(self) -> BinaryIO:
        """The log, private and open for appending; begun anew when it has grown long."""
        if self.log.exists() and self.log.stat().st_size > _LONGEST_LOG_BYTES:
            self.log.unlink()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "ab")

    def server_is_alive(self) -> bool:
        """Whether a server holds its lock. The kernel knows: no process table, no numbers that are given out again."""
        lock = take_lock(self.server_lock)
        if lock is None:
            return True
        os.close(lock)
        return False

    @contextlib.contextmanager
    def locked(self, timeout_s: float) -> Iterator[None]:
        """Be the only one who starts or stops the server. Raises `InternalError` after `timeout_s`."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        deadline = time.monotonic() + timeout_s
        while (lock := take_lock(self.start_lock)) is None:
            if time.monotonic() > deadline:
                raise InternalError(f"{self.start_lock} is held by another process for {timeout_s:.0f} s")
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            os.close(lock)


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed, or None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _make_key(path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    # The public half first: a private key that is there has its companion.
    write_atomically(path.with_suffix(".pub"), public + b"\n")
    write_atomically(path, private)
