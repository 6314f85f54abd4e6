"""The one entry point to SSH: settings in, an authenticated transport out."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import ConfigurationError
from orchestrator.ssh.config import EffectiveConfig, choose_transport, find_ssh, read_effective_config
from orchestrator.ssh.retry import with_retry
from orchestrator.ssh.settings import ConnectionSettings, Prompt, RetryListener, RetryPolicy
from orchestrator.ssh.transport import Transport


class OncePrompt:
    """A `Prompt` that puts each question to the person once, however often the connection is tried."""

    def __init__(self, prompt: Prompt | None) -> None:
        self._prompt = prompt
        self._answers: dict[str, str | None] = {}

    def __call__(self, text: str, echo: bool) -> str | None:
        if self._prompt is None:
            return None
        if text not in self._answers:
            self._answers[text] = self._prompt(text, echo)
        return self._answers[text]


def connect(
    settings: ConnectionSettings,
    retry: RetryPolicy,
    *,
    prompt: Prompt | None = None,
    on_retry: RetryListener | None = None,
    sockets_folder: Path,
) -> Transport:
    """Log in and return the transport that the profile or, under `auto`, the login's needs select.

    Network trouble is retried within `retry`. Raises `AuthenticationError` (with the fix) at once, `UnreachableError`
    when the patience is used up, `ConfigurationError`.
    """
    effective = read_effective_config(settings)
    name, _ = choose_transport(settings, effective)
    ask = OncePrompt(prompt)
    if name == "openssh" and find_ssh() is None:
        if settings.transport == "openssh":
            raise ConfigurationError("transport: openssh needs an `ssh` program", action="Install OpenSSH's client.")
        name = "fabric"

    def attempt() -> Transport:
        return _connect_once(name, settings, effective, ask, sockets_folder)

    return with_retry(attempt, retry, on_retry)


def _connect_once(
    name: str, settings: ConnectionSettings, effective: EffectiveConfig, ask: Prompt, sockets_folder: Path
) -> Transport:
    # Imported when used: paramiko alone takes a fifth of a second, and most commands never connect.
    if name == "openssh":
        from orchestrator.ssh.openssh_transport import connect_openssh

        return connect_openssh(settings, effective, ask, sockets_folder)
    from orchestrator.ssh.fabric_connect import connect_fabric

    return connect_fabric(settings, effective, ask, sockets_folder)
