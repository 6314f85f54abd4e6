"""Whether processes outlive the login session on this machine, and how to make them."""

from __future__ import annotations

import dataclasses
import getpass
import os
from typing import Optional

from remote_payload.agent.commands import ask
from remote_payload.wire.results import Finding, Severity

_ASK_LIMIT_S = 5.0
_SCOPE = ["systemd-run", "--user", "--scope", "--quiet", "--collect", "--"]


@dataclasses.dataclass(frozen=True)
class SessionRules:
    """`kills`: logind ends a user's processes at logout. `user_manager`: the user's systemd can hold them instead; it
    does so beyond the last logout only if it `lingers`.
    """

    kills: bool
    user_manager: bool = False
    lingers: bool = False


def session_rules() -> SessionRules:
    """Ask logind and the user's systemd, each for a bounded time. Where neither exists nothing is killed."""
    user = _user()
    answer = ask(
        ["loginctl", "show-session", "-p", "KillUserProcesses", "-p", "KillOnlyUsers", "-p", "KillExcludeUsers"],
        _ASK_LIMIT_S,
    )
    if user is None or answer is None or not kills_processes_of(user, answer):
        return SessionRules(kills=False)
    linger = ask(["loginctl", "show-user", user, "-p", "Linger", "--value"], _ASK_LIMIT_S)
    manager = ask([*_SCOPE, "true"], _ASK_LIMIT_S)
    return SessionRules(True, manager is not None, (linger or "").strip() == "yes")


def kills_processes_of(user: str, properties: str) -> bool:
    """Whether logind ends `user`'s processes at logout, from its `Kill*` properties as `loginctl` prints them."""
    values = dict(line.split("=", 1) for line in properties.splitlines() if "=" in line)
    only, excluded = values.get("KillOnlyUsers", "").split(), values.get("KillExcludeUsers", "").split()
    concerned = user in only if only else user not in excluded
    return values.get("KillUserProcesses") == "yes" and concerned


def detached_prefix(rules: SessionRules) -> tuple[str, list[str]]:
    """(method, words in front of the command) that let a process outlive its login session."""
    return ("systemd-run", list(_SCOPE)) if rules.kills and rules.user_manager else ("setsid", [])


def finding(rules: SessionRules) -> Optional[Finding]:
    """What to tell where jobs would die with the login session."""
    if not rules.kills or (rules.user_manager and rules.lingers):
        return None
    return Finding(
        id="node.session_kills_jobs",
        severity=Severity.WARNING,
        title="This machine ends a user's processes when the last login session closes",
        evidence={"user_manager": rules.user_manager, "lingers": rules.lingers},
        explanation="logind has KillUserProcesses=yes, so a detached run may be killed once the connection closes.",
        action="Run `loginctl enable-linger` on the node once, or ask its administrators to allow that.",
    )


def _user() -> Optional[str]:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return os.environ.get("USER")
