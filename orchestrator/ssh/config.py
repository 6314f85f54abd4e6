"""The effective ssh configuration of a host, as OpenSSH itself resolves it, and the choice of transport that follows.

`ssh -G` knows Include, Match, canonicalisation and the system's files; whatever we would parse ourselves would be a
second opinion. Only where there is no `ssh` does paramiko's reader stand in.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ConfigurationError
from orchestrator.ssh import keyfiles, known_hosts
from orchestrator.ssh.settings import ConnectionSettings

CONFIG_TIMEOUT_S = 30.0
"""`Match exec` may run a program of the user's, so `ssh -G` is not instant everywhere."""

_OLDEST_SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_IDENTITIES = ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519")


@dataclasses.dataclass(frozen=True)
class LocalFacts:
    """What files on this machine add to the configuration when a transport is chosen."""

    security_keys: tuple[Path, ...] = ()
    certificates: tuple[Path, ...] = ()
    kerberos_ticket: bool = False
    host_certificate_authority: bool = False


@dataclasses.dataclass(frozen=True)
class EffectiveConfig:
    """What OpenSSH would do for this host. Paths are expanded; lists keep OpenSSH's order."""

    alias: str
    hostname: str
    user: str
    port: int
    identity_files: tuple[Path, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    certificate_files: tuple[Path, ...] = ()
    proxy_jump: str | None = None
    proxy_command: str | None = None
    proxy_use_fdpass: bool = False
    user_known_hosts: tuple[Path, ...] = ()
    global_known_hosts: tuple[Path, ...] = ()
    host_key_alias: str | None = None
    hash_known_hosts: bool = False
    publickey: bool = True
    password: bool = True
    keyboard_interactive: bool = True
    gssapi: bool = False
    host_based: bool = False
    preferred_authentications: tuple[str, ...] = ()
    address_family: Literal["any", "inet", "inet6"] = "any"
    ciphers: tuple[str, ...] = ()
    only_openssh: tuple[str, ...] = ()
    facts: LocalFacts = LocalFacts()

    @property
    def known_hosts_name(self) -> str:
        return known_hosts.host_name_in_file(self.hostname, self.port, self.host_key_alias)

    @property
    def known_hosts_files(self) -> tuple[Path, ...]:
        return self.user_known_hosts + self.global_known_hosts

    @property
    def description(self) -> str:
        """`user@host:port`, with the alias where it is another name."""
        host = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        return f"{self.user}@{host}:{self.port}"


# Options without a counterpart in paramiko, by their value in `ssh -G` that switches them off.
_ONLY_OPENSSH = {
    "bindaddress": ("none", ""),
    "bindinterface": ("none", ""),
    "knownhostscommand": ("none", ""),
    "pkcs11provider": ("none", ""),
    "revokedhostkeys": ("none", ""),
}


def parse_ssh_g(text: str) -> dict[str, list[str]]:
    """`ssh -G` output as option (lower case) → values in order of appearance."""
    options: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            options.setdefault(name.lower(), []).append(value.strip())
    return options


def effective_from_options(
    options: Mapping[str, Sequence[str]], settings: ConnectionSettings, *, home: Path, environ: Mapping[str, str]
) -> EffectiveConfig:
    """Pure: what `ssh -G` said, under the settings of the profile. Raises `ConfigurationError`."""

    def first(name: str, default: str = "") -> str:
        return options.get(name, [default])[0] or default

    def some(name: str) -> str | None:
        value = first(name)
        return value if value and value.lower() != "none" else None

    def yes(name: str, default: str) -> bool:
        return first(name, default).lower() in ("yes", "true", "unbound", "host-bound")

    hostname = first("hostname", settings.host)
    user = settings.user or first("user", environ.get("USER", ""))
    port = _port(settings.port or first("port", "22"))
    alias = some("hostkeyalias")
    tokens = {
        "%": "%",
        "d": str(home),
        "h": hostname,
        "i": str(os.getuid()),
        "k": alias or settings.host,
        "L": socket.gethostname().partition(".")[0],
        "l": socket.gethostname(),
        "n": settings.host,
        "p": str(port),
        "r": user,
        "u": environ.get("USER", user),
    }

    def paths(values: Sequence[str]) -> tuple[Path, ...]:
        wanted = [v for v in values if v and v.lower() != "none"]
        return tuple(Path(expand(v, tokens, home, environ)) for v in wanted)

    def known(name: str) -> tuple[Path, ...]:
        return paths([word for value in options.get(name, []) for word in _file_list(value)])

    given = settings.known_hosts_files
    family = first("addressfamily", "any").lower()
    proxy = some("proxycommand")
    preferred = some("preferredauthentications")
    agent = first("identityagent")
    return EffectiveConfig(
        alias=settings.host,
        hostname=hostname,
        user=user,
        port=port,
        identity_files=settings.identity_files or paths(options.get("identityfile", [])),
        identities_only=bool(settings.identity_files) or yes("identitiesonly", "no"),
        identity_agent=_agent(agent, tokens, home, environ),
        certificate_files=paths(options.get("certificatefile", [])),
        proxy_jump=some("proxyjump"),
        proxy_command=expand_tokens(proxy, tokens) if proxy else None,
        proxy_use_fdpass=yes("proxyusefdpass", "no"),
        user_known_hosts=given or known("userknownhostsfile"),
        global_known_hosts=() if given else known("globalknownhostsfile"),
        host_key_alias=alias,
        hash_known_hosts=yes("hashknownhosts", "no"),
        publickey=yes("pubkeyauthentication", "yes"),
        password=yes("passwordauthentication", "yes"),
        keyboard_interactive=yes("kbdinteractiveauthentication", first("challengeresponseauthentication", "yes")),
        gssapi=yes("gssapiauthentication", "no"),
        host_based=yes("hostbasedauthentication", "no"),
        preferred_authentications=tuple(p.strip() for p in preferred.split(",")) if preferred else (),
        address_family="inet" if family == "inet" else "inet6" if family == "inet6" else "any",
        ciphers=tuple(c.strip() for c in first("ciphers").split(",") if c.strip()),
        only_openssh=tuple(o for o, off in _ONLY_OPENSSH.items() if first(o).lower() not in off),
    )


def expand(text: str, tokens: Mapping[str, str], home: Path, environ: Mapping[str, str]) -> str:
    """A path of ssh's configuration with `~`, `%x` and `${NAME}` replaced."""
    if text == "~" or text.startswith("~/"):
        text = str(home) + text[1:]
    text = re.sub(r"\$\{(\w+)\}", lambda m: environ.get(m.group(1), ""), text)
    return expand_tokens(text, tokens)


def expand_tokens(text: str, tokens: Mapping[str, str]) -> str:
    """`%x` replaced; a token that is not known stays as it is."""
    return re.sub(r"%(.)", lambda m: tokens.get(m.group(1), m.group(0)), text)


def choose_transport(
    settings: ConnectionSettings, effective: EffectiveConfig
) -> tuple[Literal["fabric", "openssh"], str]:
    """Which transport carries this login, and why. Pure."""
    if settings.transport != "auto":
        return settings.transport, "the profile says so"
    first_method = effective.preferred_authentications[:1]
    asks_for_code = first_method == ("keyboard-interactive",) or not effective.publickey
    facts = effective.facts
    reasons = (
        (bool(effective.certificate_files or facts.certificates), "a key has an OpenSSH certificate"),
        (bool(facts.security_keys), "a key is a hardware security key (FIDO)"),
        (facts.host_certificate_authority, "the host's key is vouched for by a certificate authority"),
        (effective.gssapi and facts.kerberos_ticket, "there is a Kerberos ticket and GSSAPIAuthentication is on"),
        (first_method[:1] == ("gssapi-with-mic",), "PreferredAuthentications begins with Kerberos"),
        (effective.host_based, "HostbasedAuthentication is on"),
        (asks_for_code and effective.keyboard_interactive, "the login asks for a code before any key"),
        (bool(effective.proxy_command) and effective.proxy_use_fdpass, "ProxyUseFdpass is on"),
        (bool(effective.only_openssh), f"paramiko does not know {', '.join(effective.only_openssh)}"),
    )
    for applies, reason in reasons:
        if applies:
            return "openssh", reason
    return "fabric", "nothing in the configuration needs more than paramiko can do"


def find_ssh() -> str | None:
    """The system's `ssh`, if there is one."""
    return shutil.which("ssh")


def read_effective_config(settings: ConnectionSettings, ssh_binary: str | None = None) -> EffectiveConfig:
    """Ask `ssh -G` (or, without an `ssh`, paramiko's reader) and look at the files it names.

    Raises `ConfigurationError`: the configuration cannot be read, or did not resolve in time.
    """
    binary = ssh_binary or find_ssh()
    options = _ask_ssh(binary, settings) if binary else _ask_paramiko(settings)
    environ = dict(os.environ)
    environ.setdefault("USER", getpass.getuser())
    effective = effective_from_options(options, settings, home=Path.home(), environ=environ)
    return dataclasses.replace(effective, facts=_look_at_files(effective))


def ssh_arguments(settings: ConnectionSettings) -> list[str]:
    """The options of `ssh` that stand for the settings, for `-G` and for a login alike."""
    arguments = []
    if settings.ssh_config_file is not None:
        arguments += ["-F", str(settings.ssh_config_file)]
    if settings.user is not None:
        arguments += ["-l", settings.user]
    if settings.port is not None:
        arguments += ["-p", str(settings.port)]
    return arguments


def _ask_ssh(binary: str, settings: ConnectionSettings) -> dict[str, list[str]]:
    command = [binary, "-G", "-T", *ssh_arguments(settings), "--", settings.host]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CONFIG_TIMEOUT_S,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"ssh did not resolve its configuration for {settings.host} within {CONFIG_TIMEOUT_S:.0f} s",
            action=f"Look for a slow `Match exec`: run `{shlex.join(command)}`.",
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{binary} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        raise ConfigurationError(
            f"ssh cannot read its configuration for {settings.host}",
            action=f"Mend what it complains of; `{shlex.join(command)}` shows it.",
            details=done.stderr.strip(),
        )
    return parse_ssh_g(done.stdout)


def _ask_paramiko(settings: ConnectionSettings) -> dict[str, list[str]]:
    import paramiko

    config = paramiko.SSHConfig()
    files = [settings.ssh_config_file] if settings.ssh_config_file else [Path.home() / ".ssh/config"]
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                config.parse(file)
        except FileNotFoundError:
            continue
        except (OSError, paramiko.ConfigParseError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from error
    found: dict[str, list[str]] = {
        "identityfile": list(_DEFAULT_IDENTITIES),
        "userknownhostsfile": ["~/.ssh/known_hosts"],
        "globalknownhostsfile": list(_OLDEST_SYSTEM_KNOWN_HOSTS),
    }
    looked_up: dict[str, Any] = dict(config.lookup(settings.host))
    for name, value in looked_up.items():
        found[name] = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return found


def _look_at_files(effective: EffectiveConfig) -> LocalFacts:
    security, certificates = [], list(effective.certificate_files)
    for path in effective.identity_files:
        facts, _ = keyfiles.look_at_key(path)
        if facts is None:
            continue
        if facts.public is not None and facts.public.key_type.startswith("sk-"):
            security.append(path)
        if (certificate := path.with_name(path.name + "-cert.pub")).is_file():
            certificates.append(certificate)
    try:
        lines = known_hosts.read_known_hosts(effective.known_hosts_files)
    except OSError:
        lines = ()  # the login itself reads them again, and says so
    authority = known_hosts.has_certificate_authority(lines, effective.known_hosts_name)
    return LocalFacts(tuple(security), tuple(certificates), _has_kerberos_ticket(os.environ), authority)


def _has_kerberos_ticket(environ: Mapping[str, str]) -> bool:
    cache = environ.get("KRB5CCNAME")
    if cache is None:
        return Path(f"/tmp/krb5cc_{os.getuid()}").is_file()  # noqa: S108  (Kerberos' own default place)
    kind, _, place = cache.rpartition(":")
    return kind not in ("", "FILE") or Path(place).is_file()


def _agent(value: str, tokens: Mapping[str, str], home: Path, environ: Mapping[str, str]) -> str | None:
    if value.lower() == "none":
        return None
    if not value or value == "SSH_AUTH_SOCK":
        return environ.get("SSH_AUTH_SOCK")
    if value.startswith("$") and not value.startswith("${"):
        return environ.get(value[1:])
    return expand(value, tokens, home, environ)


def _port(value: str | int) -> int:
    try:
        port = int(value)
    except ValueError:
        port = 0
    if not 0 < port < 65536:
        raise ConfigurationError(f"{value!r} is no port")
    return port


def _file_list(value: str) -> list[str]:
    """A list of files as `ssh -G` prints it: without the quotes around names that hold spaces."""
    files: list[str] = []
    for word in value.split(" "):
        if files and not word.startswith(("/", "~", "%", "$", "none")):
            files[-1] += " " + word
        else:
            files.append(word)
    return files
