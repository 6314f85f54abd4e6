"""Why a login failed, and what mends it. Pure: facts in, one error of our tree out.

Every error carries the server's own words in `details` (untrusted) and the exact next step in `action`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import (
    AuthenticationError,
    HostKeyError,
    LoginRefusedError,
    RemoteEvalError,
)
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.foreign_errors import dropped_before_login
from orchestrator.ssh.keyfiles import KeyProblem, KeyTrouble
from orchestrator.ssh.known_hosts import (
    SSH_PORT,
    HostKeyVerdict,
    Judgement,
    KnownHost,
)

_SERVER_HAD_ENOUGH = (2, 14)
"""SSH_DISCONNECT_PROTOCOL_ERROR, which OpenSSH's sshd sends with "Too many authentication failures", and
SSH_DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE, which others do."""


@dataclasses.dataclass
class LoginRecord:
    """What happened during one login, filled in as it happens."""

    offered: list[str] = dataclasses.field(default_factory=list)
    problems: list[KeyProblem] = dataclasses.field(default_factory=list)
    allowed_methods: tuple[str, ...] = ()
    methods_tried: list[str] = dataclasses.field(default_factory=list)
    methods_not_answered: list[str] = dataclasses.field(default_factory=list)
    partial_success: bool = False
    server_words: list[str] = dataclasses.field(default_factory=list)
    disconnect_code: int | None = None


def host_key_error(effective: EffectiveConfig, key: str, judgement: Judgement) -> HostKeyError:
    """The error for a host key (`type SHA256:…`) that is not known, with the lines that
    speak of it and the command that mends it."""
    if judgement.verdict is HostKeyVerdict.REVOKED:
        return HostKeyError(
            f"the host key of {effective.description} is marked as revoked at {_place(judgement.lines[0])}",
            action="Do not connect. Ask the administrator which key is right.",
            details=key,
        )
    if judgement.verdict is HostKeyVerdict.CHANGED:
        return _changed(effective, key, judgement.lines)
    return HostKeyError(
        f"the host key of {effective.description} is not known: {key}",
        action=f"Compare the fingerprint with the one that the administrator gives, then run `{_accept(effective)}`"
        f" (it adds the key to {_first_file(effective)}).",
        details=key,
    )


def host_key_refused_by_person(effective: EffectiveConfig, key: str) -> HostKeyError:
    """The error where the host key was shown and not accepted."""
    return HostKeyError(
        f"the host key of {effective.description} was not accepted: {key}",
        action="Compare the fingerprint with the one that the administrator gives, and answer yes if they are equal.",
    )


def login_error(effective: EffectiveConfig, record: LoginRecord) -> RemoteEvalError:
    """The error for a login that ended without success while the server was still there or hung up on us."""
    words = "\n".join([*record.server_words, *_what_was_tried(record)])
    if record.disconnect_code in _SERVER_HAD_ENOUGH and record.offered:
        return _too_many(effective, record, words)
    if record.partial_success:
        wanted = ", ".join(record.allowed_methods) or "more"
        return LoginRefusedError(
            f"{effective.description} took the first step of the login and wants another ({wanted})",
            action="Run on a terminal, where the code can be asked for; or set `transport: openssh` in the profile.",
            details=words,
        )
    if record.methods_not_answered and not record.offered:
        asked = ", ".join(record.methods_not_answered)
        return LoginRefusedError(
            f"{effective.description} asks for a secret ({asked}), and there is no terminal to ask on",
            action=f"Run on a terminal, or give it a key: `ssh-copy-id {_target(effective)}`.",
            details=words,
        )
    locked = [p for p in record.problems if p.trouble is not KeyTrouble.MISSING]
    if not record.offered and "publickey" in record.allowed_methods:
        return _nothing_offered(effective, locked, words)
    if record.offered:
        return LoginRefusedError(
            f"{effective.description} refused {_count(len(record.offered), 'key')}: {'; '.join(record.offered)}",
            action=f"Check the user name ({effective.user!r} is used), and that one of these keys is in its"
            f" ~/.ssh/authorized_keys: `ssh-copy-id {_target(effective)}` puts it there.{_key_hint(locked)}",
            details=words,
        )
    allowed = ", ".join(record.allowed_methods) or "none that it named"
    return LoginRefusedError(
        f"{effective.description} accepts no way to log in that we have; it allows: {allowed}",
        action="Ask its administrator how to log in. For Kerberos, hardware keys or codes set `transport: openssh`.",
        details=words,
    )


def dropped_during_login(effective: EffectiveConfig, record: LoginRecord) -> RemoteEvalError:
    """The error for a connection that ended in the middle of the login."""
    if record.disconnect_code in _SERVER_HAD_ENOUGH and record.offered:
        return login_error(effective, record)
    return dropped_before_login(effective.description, "\n".join([*record.server_words, *_what_was_tried(record)]))


def _changed(effective: EffectiveConfig, key: str, lines: Sequence[KnownHost]) -> HostKeyError:
    known = "; ".join(f"{line.key} at {_place(line)}" for line in lines)
    removals = " and ".join(
        f"`ssh-keygen -R {shlex.quote(effective.known_hosts_name)} -f {shlex.quote(file)}`"
        for file in dict.fromkeys(line.file for line in lines)
    )
    return HostKeyError(
        f"the host key of {effective.description} has changed: it shows {key}, known is {known}",
        action="Either the machine was set up anew, or somebody stands between. Ask the administrator; if the new"
        f" fingerprint is right, run {removals}, then `{_accept(effective)}`.",
        details=f"shown: {key}\nknown: {known}",
    )


def _too_many(effective: EffectiveConfig, record: LoginRecord, words: str) -> AuthenticationError:
    return LoginRefusedError(
        f"{effective.description} ended the login after {_count(len(record.offered), 'key')}: its limit of tries"
        " (MaxAuthTries)",
        action="Say which key is right: `identity_files: [~/.ssh/NAME]` in the profile, or IdentityFile together with"
        " `IdentitiesOnly yes` in ~/.ssh/config.",
        details=words,
    )


def _nothing_offered(effective: EffectiveConfig, locked: Sequence[KeyProblem], words: str) -> AuthenticationError:
    if locked:
        return LoginRefusedError(
            f"no key could be offered to {effective.description}: {_explain(locked[0])}",
            action=_key_action(locked[0]),
            details=words,
        )
    places = ", ".join(str(p) for p in effective.identity_files[:3]) or "nowhere"
    return LoginRefusedError(
        f"there is no key to offer to {effective.description}; looked for {places} and in the ssh agent",
        action=f"Name the key in the profile (`identity_files`), load it (`ssh-add`), or make one: `ssh-keygen -t"
        f" ed25519`, then `ssh-copy-id {_target(effective)}`.",
        details=words,
    )


def _key_action(problem: KeyProblem) -> str:
    path = shlex.quote(problem.path)
    actions = {
        KeyTrouble.PERMISSIONS: f"Make it private: `chmod 600 {path}`.",
        KeyTrouble.LOCKED: f"Load it into the agent (`ssh-add {path}`), or run on a terminal.",
        KeyTrouble.MISTYPED: f"Check the passphrase: `ssh-keygen -y -f {path}`.",
        KeyTrouble.UNSUPPORTED: "Set `transport: openssh` in the profile.",
        KeyTrouble.SIGNING_FAILED: "Unlock or confirm the key in the agent, then try again.",
        KeyTrouble.MISSING: "Check the path of the key.",
    }
    return actions.get(problem.trouble, f"Check the file: `ssh-keygen -y -f {path}`.")


def _key_hint(locked: Sequence[KeyProblem]) -> str:
    return f" Not offered: {_explain(locked[0])}. {_key_action(locked[0])}" if locked else ""


def _explain(problem: KeyProblem) -> str:
    words = f" ({problem.words})" if problem.words else ""
    return f"{problem.path}: {problem.trouble.value}{words}"


def _what_was_tried(record: LoginRecord) -> list[str]:
    lines = [f"offered: {key}" for key in record.offered]
    lines += [f"not offered: {_explain(p)}" for p in record.problems]
    if record.allowed_methods:
        lines.append(f"the server allows: {', '.join(record.allowed_methods)}")
    return lines


def _accept(effective: EffectiveConfig) -> str:
    if effective.proxy_jump or effective.proxy_command or effective.host_key_alias:
        return f"ssh {_target(effective)} true"
    port = "" if effective.port == SSH_PORT else f"-p {effective.port} "
    return f"ssh-keyscan {port}{shlex.quote(effective.hostname)} >> {shlex.quote(_first_file(effective))}"


def _target(effective: EffectiveConfig) -> str:
    if effective.alias != effective.hostname:
        return shlex.quote(effective.alias)
    port = "" if effective.port == SSH_PORT else f"-p {effective.port} "
    return f"{port}{shlex.quote(f'{effective.user}@{effective.hostname}')}"


def _first_file(effective: EffectiveConfig) -> str:
    return str(effective.user_known_hosts[0] if effective.user_known_hosts else Path.home() / ".ssh/known_hosts")


def _place(line: KnownHost) -> str:
    return f"{line.file}:{line.line}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
