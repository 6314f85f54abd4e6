"""What a connection needs to know; the cluster profile fills it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

TransportName = Literal["auto", "fabric", "openssh"]
HostKeyPolicy = Literal["strict", "ask"]


@dataclasses.dataclass(frozen=True)
class ConnectionSettings:
    """How to reach a node. `host` may be an alias of the user's ssh configuration; None leaves a field to it.

    `ssh_config_file` and `known_hosts_files` replace the user's own only for the embedded node and for tests.
    `host_key_policy`: `strict` refuses an unknown key with the fix; `ask` shows its fingerprint on a terminal and asks.
    """

    host: str
    user: str | None = None
    port: int | None = None
    transport: TransportName = "auto"
    host_key_policy: HostKeyPolicy = "strict"
    identity_files: tuple[Path, ...] = ()
    ssh_config_file: Path | None = None
    known_hosts_files: tuple[Path, ...] = ()
    connect_timeout_s: float = 15.0
    banner_timeout_s: float = 20.0
    auth_timeout_s: float = 30.0
    keepalive_s: float = 15.0


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Network trouble is retried with exponential backoff and jitter until `patience_s` has passed."""

    patience_s: float = 120.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0


@dataclasses.dataclass(frozen=True)
class RetryNotice:
    """One retry, for showing: why, which attempt just failed, and when the next begins."""

    reason: str
    attempt: int
    wait_s: float
    patience_left_s: float


RetryListener = Callable[[RetryNotice], None]
"""Called before each wait."""

Prompt = Callable[[str, bool], "str | None"]
"""Ask the person: (text, echo) → answer, or None where there is no terminal. Called at most once per question."""
