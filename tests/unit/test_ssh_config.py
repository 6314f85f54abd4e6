"""The effective configuration, and which transport follows from it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ConfigurationError
from orchestrator.ssh.config import (
    EffectiveConfig,
    LocalFacts,
    choose_transport,
    effective_from_options,
    parse_ssh_g,
    read_effective_config,
)
from orchestrator.ssh.settings import ConnectionSettings
from tests.support.sshd import make_key

# Recorded from OpenSSH 9.2, shortened.
RECORDED = """\
host tensor02
user alice
hostname tensor02.cs.example.edu
port 2222
addressfamily inet
batchmode no
gssapiauthentication yes
hashknownhosts yes
identitiesonly yes
kbdinteractiveauthentication no
passwordauthentication yes
pubkeyauthentication true
identityfile ~/.ssh/id_tensor
identityfile ~/.ssh/%r-%h
certificatefile none
globalknownhostsfile /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2
userknownhostsfile /home/alice/My Files/known_hosts /home/alice/.ssh/known_hosts2
identityagent ${XDG_RUNTIME_DIR}/agent.sock
proxyjump bob@bastion:2200
proxycommand none
hostkeyalias Tensor
connecttimeout none
"""
HOME = Path("/home/alice")
ENVIRONMENT = {"USER": "alice", "XDG_RUNTIME_DIR": "/run/user/1000"}
SETTINGS = ConnectionSettings(host="tensor02")
PLAIN = EffectiveConfig("h", "h", "u", 22)


def recorded(settings: ConnectionSettings = SETTINGS) -> EffectiveConfig:
    return effective_from_options(parse_ssh_g(RECORDED), settings, home=HOME, environ=ENVIRONMENT)


def test_what_ssh_said_is_read_with_its_tokens_replaced() -> None:
    effective = recorded()
    assert (effective.hostname, effective.user, effective.port) == ("tensor02.cs.example.edu", "alice", 2222)
    assert effective.identity_files == (HOME / ".ssh/id_tensor", HOME / ".ssh/alice-tensor02.cs.example.edu")
    assert effective.user_known_hosts == (
        Path("/home/alice/My Files/known_hosts"),
        Path("/home/alice/.ssh/known_hosts2"),
    )
    assert effective.identity_agent == "/run/user/1000/agent.sock"
    assert (effective.proxy_jump, effective.proxy_command) == ("bob@bastion:2200", None)
    assert effective.certificate_files == ()
    assert effective.known_hosts_name == "tensor"
    assert (effective.identities_only, effective.keyboard_interactive, effective.address_family) == (
        True,
        False,
        "inet",
    )


def test_the_profiles_settings_stand_before_the_configuration() -> None:
    settings = dataclasses.replace(
        SETTINGS, user="carol", port=22, identity_files=(Path("/k"),), known_hosts_files=(Path("/kh"),)
    )
    effective = recorded(settings)
    assert (effective.user, effective.port, effective.identity_files) == ("carol", 22, (Path("/k"),))
    assert effective.known_hosts_files == (Path("/kh"),)


def test_a_proxy_command_gets_host_port_and_user() -> None:
    options = parse_ssh_g("hostname real\nport 99\nproxycommand nc -X 5 %h %p %% %r %n %q\n")
    effective = effective_from_options(options, SETTINGS, home=HOME, environ={"USER": "me"})
    assert effective.proxy_command == "nc -X 5 real 99 % me tensor02 %q"


@pytest.mark.parametrize(
    ("value", "expected"), [("none", None), ("SSH_AUTH_SOCK", "/a"), ("$OTHER", "/b"), ("~/s", "/home/alice/s")]
)
def test_the_agents_socket_is_found_as_ssh_finds_it(value: str, expected: str | None) -> None:
    environ = {"SSH_AUTH_SOCK": "/a", "OTHER": "/b", "USER": "u"}
    options = parse_ssh_g(f"identityagent {value}\n")
    assert effective_from_options(options, SETTINGS, home=HOME, environ=environ).identity_agent == expected


@pytest.mark.parametrize("port", ["0", "65536", "ssh"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ConfigurationError):
        effective_from_options({"port": [port]}, SETTINGS, home=HOME, environ={})


@pytest.mark.parametrize(
    "change",
    [
        {"certificate_files": (Path("c"),)},
        {"facts": LocalFacts(certificates=(Path("c"),))},
        {"facts": LocalFacts(security_keys=(Path("k"),))},
        {"facts": LocalFacts(host_certificate_authority=True)},
        {"gssapi": True, "facts": LocalFacts(kerberos_ticket=True)},
        {"preferred_authentications": ("gssapi-with-mic", "publickey")},
        {"preferred_authentications": ("keyboard-interactive",)},
        {"publickey": False},
        {"host_based": True},
        {"proxy_command": "x", "proxy_use_fdpass": True},
        {"only_openssh": ("pkcs11provider",)},
    ],
)
def test_what_paramiko_cannot_do_selects_openssh(change: dict[str, object]) -> None:
    effective = dataclasses.replace(PLAIN, **change)  # type: ignore[arg-type]
    name, reason = choose_transport(ConnectionSettings(host="h"), effective)
    assert name == "openssh"
    assert reason
    assert choose_transport(ConnectionSettings(host="h", transport="fabric"), effective)[0] == "fabric"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gssapi": True},  # Debian's default, without a ticket
        {"facts": LocalFacts(kerberos_ticket=True)},
        {"proxy_jump": "a,b"},
        {"proxy_command": "nc %h %p"},
        {"preferred_authentications": ("publickey", "keyboard-interactive")},
        {"identity_agent": "/agent"},
    ],
)
def test_everything_else_stays_with_fabric(change: dict[str, object]) -> None:
    effective = dataclasses.replace(PLAIN, **change)  # type: ignore[arg-type]
    assert choose_transport(ConnectionSettings(host="h"), effective)[0] == "fabric"
    assert choose_transport(ConnectionSettings(host="h", transport="openssh"), effective)[0] == "openssh"


def test_include_and_match_are_resolved_by_ssh_itself(tmp_path: Path) -> None:
    (tmp_path / "more").write_text("Match host inner.example user eve\n  Port 2345\n")
    config = tmp_path / "config"
    config.write_text(f"Host alias\n  HostName inner.example\n  User eve\nInclude {tmp_path}/more\n")
    effective = read_effective_config(ConnectionSettings(host="alias", ssh_config_file=config))
    assert (effective.alias, effective.hostname, effective.user, effective.port) == (
        "alias",
        "inner.example",
        "eve",
        2345,
    )


def test_without_an_ssh_program_paramikos_reader_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = tmp_path / "config"
    config.write_text("Host alias\n  HostName inner.example\n  Port 2345\n  IdentityFile ~/k\n")
    effective = read_effective_config(ConnectionSettings(host="alias", user="me", ssh_config_file=config))
    assert (effective.hostname, effective.user, effective.port) == ("inner.example", "me", 2345)
    assert effective.identity_files == (Path.home() / "k",)


def test_certificates_security_keys_and_host_authorities_are_seen_in_the_files(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    known = tmp_path / "known_hosts"
    settings = ConnectionSettings(
        host="node.example", identity_files=(key,), ssh_config_file=Path(os.devnull), known_hosts_files=(known,)
    )
    assert read_effective_config(settings).facts.certificates == ()
    (tmp_path / "key-cert.pub").write_text("a certificate")
    known.write_text("@cert-authority *.example ssh-ed25519 AAAA\n")
    facts = read_effective_config(settings).facts
    assert facts.certificates == (tmp_path / "key-cert.pub",)
    assert facts.host_certificate_authority


def test_a_host_that_looks_like_an_option_is_no_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        read_effective_config(ConnectionSettings(host=f"-oProxyCommand=touch {tmp_path}/pwned"))
    assert not (tmp_path / "pwned").exists()


def test_importing_the_entry_point_imports_no_ssh_library() -> None:
    code = (
        "import sys, orchestrator.ssh.connect, orchestrator.embedded; "
        "print([m for m in ('paramiko', 'fabric', 'invoke', 'asyncssh', 'tenacity') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
