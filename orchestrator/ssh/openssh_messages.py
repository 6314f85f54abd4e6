"""What OpenSSH's client says when a login fails, as errors of ours.

Text is the only interface that the program has. The messages below are those of OpenSSH 7.6 to 10, in the C locale,
which the program is started in; entries say where in its source they come from. A message that is not listed stops the
run rather than being tried again.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from orchestrator.errors import (
    AuthenticationError,
    ConfigurationError,
    HostKeyError,
    InternalError,
    RemoteEvalError,
    UnreachableError,
)
from orchestrator.ssh import diagnosis
from orchestrator.ssh.config import EffectiveConfig
from orchestrator.ssh.diagnosis import LoginRecord
from orchestrator.ssh.foreign_errors import dropped_before_login
from orchestrator.ssh.keyfiles import KeyProblem, KeyTrouble
from orchestrator.ssh.known_hosts import HostKeyVerdict, Judgement, KnownHost

_DEBUG = re.compile(r"debug\d: ")
_OFFERED = re.compile(r"^debug1: Offering public key: (?P<key>.+)$", re.MULTILINE)  # sshconnect2.c
_CAN_CONTINUE = re.compile(r"^debug1: Authentications that can continue: (?P<methods>\S+)", re.MULTILINE)
_ACCEPTED = re.compile(r"^debug1: Server accepts key: (?P<path>.+?) \S+ SHA256:\S+", re.MULTILINE)
_PARTIAL = re.compile(r"^Authenticated using \S+ with partial success", re.MULTILINE)
_SERVER_KEY = re.compile(r"^debug1: Server host key: (?P<key>\S+ SHA256:\S+)", re.MULTILINE)  # sshconnect.c
_DISCONNECT = re.compile(r"^Received disconnect from .*?(?:port \d+)?:(?P<code>\d+): (?P<words>.*)$", re.MULTILINE)
_KEY_TROUBLES = (
    (re.compile(r"Permissions \d+ for '(?P<path>.+)' are too open"), KeyTrouble.PERMISSIONS),  # authfile.c
    (re.compile(r"Load key \"(?P<path>.+)\": incorrect passphrase"), KeyTrouble.MISTYPED),  # sshconnect2.c
    (re.compile(r"Load key \"(?P<path>.+)\": (?P<words>(?!bad permissions).+)"), KeyTrouble.UNREADABLE),
    (re.compile(r"[Nn]o such identity: (?P<path>.+?): No such file"), KeyTrouble.MISSING),
    (re.compile(r"sign_and_send_pubkey: signing failed for \S+ \"(?P<path>.+?)\""), KeyTrouble.SIGNING_FAILED),
    (re.compile(r"Identity file (?P<path>.+) not accessible"), KeyTrouble.MISSING),  # ssh.c
)
_Maker = Callable[[EffectiveConfig, LoginRecord, str], RemoteEvalError]
"""(configuration, what happened, the client's words) → the error."""


def login_record(text: str) -> LoginRecord:
    """What happened during the login, from the client's log at level DEBUG1."""
    record = LoginRecord()
    record.offered = [m["key"].strip() for m in _OFFERED.finditer(text)]
    allowed = [tuple(m["methods"].split(",")) for m in _CAN_CONTINUE.finditer(text)]
    record.allowed_methods = allowed[-1] if allowed else ()
    record.partial_success = bool(_PARTIAL.search(text))
    for pattern, trouble in _KEY_TROUBLES:
        for match in pattern.finditer(text):
            words = match.groupdict().get("words") or ""
            record.problems.append(KeyProblem(match["path"], trouble, words))
    unused = {match["path"] for match in _ACCEPTED.finditer(text)}
    if unused and not record.partial_success:
        # The server would have taken it; what failed is on this side, and the client says nothing of a passphrase.
        record.offered = [key for key in record.offered if not key.startswith(tuple(f"{path} " for path in unused))]
        for path in unused - {problem.path for problem in record.problems}:
            record.problems.append(KeyProblem(path, KeyTrouble.MISTYPED))
    if disconnect := _DISCONNECT.search(text):
        record.disconnect_code = int(disconnect["code"])
    record.server_words = plain_lines(text)
    return record


def plain_lines(text: str) -> list[str]:
    """The lines that a person would have seen."""
    return [line.rstrip() for line in text.splitlines() if line.strip() and not _DEBUG.match(line)]


def login_failure(text: str, effective: EffectiveConfig, known: tuple[KnownHost, ...]) -> RemoteEvalError:
    """The error for a login that the client gave up; `known` are the lines of the known_hosts files."""
    said = "\n".join(plain_lines(text))
    if re.search(r"^Host key verification failed\.|REVOKED HOST KEY", said, re.MULTILINE):  # sshconnect.c
        return _host_key_failure(text, said, effective, known)
    record = login_record(text)
    for pattern, make in _FAILURES:
        if pattern.search(said):
            return make(effective, record, said)
    return AuthenticationError(
        f"ssh did not log in to {effective.description}",
        action="Its own words are below; run `ssh -v` by hand to see more.",
        details=said,
    )


def _host_key_failure(
    text: str, said: str, effective: EffectiveConfig, known: tuple[KnownHost, ...]
) -> RemoteEvalError:
    shown = _SERVER_KEY.search(text)
    if shown is None:
        return HostKeyError(
            f"a host key on the way to {effective.description} is not known, or has changed",
            action="Log in to the jump host by hand once and compare its fingerprint.",
            details=said,
        )
    lines = tuple(line for line in known if line.matches(effective.known_hosts_name))
    if "REVOKED HOST KEY" in said:
        revoked = tuple(line for line in lines if line.marker == "@revoked")
        if revoked:
            return diagnosis.host_key_error(effective, shown["key"], Judgement(HostKeyVerdict.REVOKED, revoked))
    lines = tuple(line for line in lines if not line.marker)
    # An unknown host may have no line; a changed one always has.
    verdict = HostKeyVerdict.CHANGED if lines else HostKeyVerdict.UNKNOWN
    error = diagnosis.host_key_error(effective, shown["key"], Judgement(verdict, lines))
    error.details = f"{error.details}\n{said}"
    return error


def _unreachable(cause: str, action: str) -> _Maker:
    def make(effective: EffectiveConfig, _: LoginRecord, said: str) -> RemoteEvalError:
        return UnreachableError(cause.format(target=effective.description), action=action, details=said)

    return make


def _configuration(cause: str, action: str) -> _Maker:
    def make(effective: EffectiveConfig, _: LoginRecord, said: str) -> RemoteEvalError:
        return ConfigurationError(cause.format(target=effective.description), action=action, details=said)

    return make


def _login(effective: EffectiveConfig, record: LoginRecord, _: str) -> RemoteEvalError:
    return diagnosis.login_error(effective, record)


def _dropped(effective: EffectiveConfig, record: LoginRecord, said: str) -> RemoteEvalError:
    if record.offered:
        return diagnosis.dropped_during_login(effective, record)
    return dropped_before_login(effective.description, said)


def _internal(_: EffectiveConfig, __: LoginRecord, said: str) -> RemoteEvalError:
    return InternalError("ssh could not make its control socket", details=said)


def _any(*messages: str) -> re.Pattern[str]:
    return re.compile("|".join(messages), re.MULTILINE)


# The first that matches decides; refusals stand before the closed connections that follow from them.
_FAILURES: tuple[tuple[re.Pattern[str], _Maker], ...] = (
    (_any(r"Permission denied \(", r"Too many authentication failures", r"No supported authentication"), _login),
    (
        _any(r"Bad configuration option", r"bad configuration options", r"Bad owner or permissions on"),  # readconf.c
        _configuration("ssh refuses its configuration file", "Mend the line or the permissions that it names."),
    ),
    (
        _any(r"Unable to negotiate with", r"no matching .* found", r"no mutual signature"),  # kex.c, packet.c
        _configuration("{target} and this ssh have no algorithm in common", "Update OpenSSH here or there."),
    ),
    (_any(r"ControlPath too long", r"ControlSocket .* already exists", r"unix_listener: "), _internal),  # mux.c
    (
        _any(r"Could not resolve hostname"),  # ssh.c, sshconnect.c
        _unreachable(
            "no name server knows the host of {target}",
            "Check the spelling of `host` in the profile (or its HostName in ~/.ssh/config), and the VPN.",
        ),
    ),
    (
        _any(r"Connection refused"),
        _unreachable(
            "{target} refuses connections on this port", "Check the port in the profile, and that sshd runs there."
        ),
    ),
    (
        _any(r"No route to host", r"Network is unreachable", r"Host is down"),
        _unreachable("there is no route to {target}", "Check the network here, and the VPN."),
    ),
    (
        _any(
            r"[Cc]onnection timed out", r"Operation timed out", r"Connection to .* timed out", r"Timeout, server .* not"
        ),
        _unreachable(
            "{target} did not answer in time",
            "Check that the machine is up, and that the VPN or jump host that leads to it works.",
        ),
    ),
    (
        _any(
            r"Connection closed by",
            r"Connection reset by",
            r"kex_exchange_identification: ",
            r"banner exchange: ",
            r"Broken pipe",
            r"Connection to .* closed",
            r"Received disconnect from",
        ),
        _dropped,
    ),
)
