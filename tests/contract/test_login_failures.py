"""What a login that fails says, over both transports and against a real sshd: the cause by type, and the exact fix."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    ExitCode,
    HostKeyError,
    LoginRefusedError,
    UnreachableError,
)
from orchestrator.ssh.bulk import BulkLogins
from orchestrator.ssh.config import read_effective_config
from orchestrator.ssh.settings import ConnectionSettings, RetryNotice, RetryPolicy
from orchestrator.ssh.transport import Transport
from tests.support.sshd import HOST, Sshd, find_program, fingerprint, free_port, make_key, public_half, running_sshd
from tests.support.world import until

LIMIT_S = 60.0
Connect = Callable[..., Transport]


def works(transport: Transport) -> bool:
    return transport.run("echo in", timeout_s=LIMIT_S).stdout == b"in\n"


def test_an_unknown_host_key_is_refused_with_its_fingerprint_and_the_fix(
    connect_to: Connect, sshd: Sshd, tmp_path: Path
) -> None:
    empty = tmp_path / "known_hosts"
    with pytest.raises(HostKeyError) as caught:
        connect_to(sshd.settings(known_hosts_files=(empty,)))
    assert fingerprint(sshd.host_key) in str(caught.value)
    assert f"ssh-keyscan -p {sshd.port} {HOST} >> {empty}" in caught.value.action
    assert caught.value.exit_code is ExitCode.AUTHENTICATION
    assert not empty.exists()


def test_a_changed_host_key_is_refused_with_both_fingerprints_and_the_line(
    connect_to: Connect, sshd: Sshd, tmp_path: Path
) -> None:
    other = make_key(tmp_path / "other")
    known = tmp_path / "known_hosts"
    known.write_text(f"# a comment\n[{HOST}]:{sshd.port} {public_half(other)}\n")
    with pytest.raises(HostKeyError) as caught:
        connect_to(sshd.settings(known_hosts_files=(known,), host_key_policy="ask"), prompt=lambda text, echo: "yes")
    assert fingerprint(sshd.host_key) in str(caught.value)
    assert fingerprint(other) in str(caught.value)
    assert f"{known}:2" in str(caught.value)
    assert f"ssh-keygen -R '[{HOST}]:{sshd.port}' -f {known}" in caught.value.action


def test_a_revoked_host_key_is_refused(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    line = sshd.known_hosts.read_text()
    known.write_text(line + "@revoked " + line)
    with pytest.raises(HostKeyError, match="revoked"):
        connect_to(sshd.settings(known_hosts_files=(known,)))


def test_a_hashed_known_host_is_known(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(sshd.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True, timeout=60)
    assert HOST not in known.read_text()
    assert works(connect_to(sshd.settings(known_hosts_files=(known,))))


def test_a_host_key_alias_is_looked_up_alone(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"the-node {public_half(sshd.host_key)}\n")
    config = tmp_path / "config"
    config.write_text(f"Host anything\n  HostName {HOST}\n  HostKeyAlias the-node\n")
    assert works(connect_to(sshd.settings(host="anything", ssh_config_file=config, known_hosts_files=(known,))))


def test_an_unknown_host_key_that_a_person_accepts_is_remembered(
    connect_to: Connect, sshd: Sshd, tmp_path: Path
) -> None:
    known = tmp_path / "known_hosts"
    asked: list[str] = []

    def prompt(text: str, echo: bool) -> str:
        asked.append(text)
        return "yes"

    settings = sshd.settings(known_hosts_files=(known,), host_key_policy="ask")
    assert works(connect_to(settings, prompt=prompt))
    assert fingerprint(sshd.host_key) in asked[0]
    assert works(connect_to(sshd.settings(known_hosts_files=(known,))))
    assert len(asked) == 1


def test_an_unknown_host_key_that_a_person_declines_is_refused(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    with pytest.raises(HostKeyError):
        connect_to(sshd.settings(known_hosts_files=(known,), host_key_policy="ask"), prompt=lambda text, echo: "no")
    assert not known.exists()


def test_a_refused_key_is_named_once_and_never_retried(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    notices: list[RetryNotice] = []
    before = sshd.log.count("Connection from")
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(stranger,)), RetryPolicy(patience_s=30.0), on_retry=notices.append)
    assert str(stranger) in str(caught.value)
    assert fingerprint(stranger) in str(caught.value)
    assert "ssh-copy-id" in caught.value.action
    assert "publickey" in caught.value.details
    assert notices == []
    assert sshd.log.count("Connection from") == before + 1


def test_a_wrong_user_is_told_which_user_was_used(connect_to: Connect, sshd: Sshd) -> None:
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(user="nobody-of-that-name"))
    assert "nobody-of-that-name" in str(caught.value)
    assert "nobody-of-that-name" in caught.value.action


def test_the_embedded_node_refuses_another_key_and_another_user(
    connect_to: Connect, embedded_settings: ConnectionSettings, tmp_path: Path
) -> None:
    import dataclasses

    stranger = make_key(tmp_path / "stranger")
    for change in ({"identity_files": (stranger,)}, {"user": getpass.getuser() + "x"}):
        with pytest.raises(LoginRefusedError):
            connect_to(dataclasses.replace(embedded_settings, **change))  # type: ignore[arg-type]


def test_too_many_keys_are_told_apart_from_a_refusal(connect_to: Connect, tmp_path: Path) -> None:
    keys = tuple(make_key(tmp_path / f"key{i}") for i in range(4))
    with running_sshd(tmp_path / "sshd", {"MaxAuthTries": "2"}) as server:
        with pytest.raises(LoginRefusedError) as caught:
            connect_to(server.settings(identity_files=(*keys, server.client_key)))
        assert "MaxAuthTries" in str(caught.value)
        assert "IdentitiesOnly" in caught.value.action
        assert works(connect_to(server.settings(identity_files=(keys[0], server.client_key))))


def test_a_key_that_others_may_read_is_not_offered(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    sshd.authorise(key)
    key.chmod(0o644)
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(key,)))
    assert f"chmod 600 {key}" in caught.value.action
    key.chmod(0o600)
    assert works(connect_to(sshd.settings(identity_files=(key,))))


def test_a_missing_key_is_named(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-key"
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(missing,)))
    assert str(missing) in str(caught.value) + caught.value.details


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_an_encrypted_key_is_opened_by_its_passphrase_asked_once(
    connect_to: Connect, sshd: Sshd, tmp_path: Path, kind: str
) -> None:
    key = make_key(tmp_path / "key", kind, passphrase="open sesame")
    sshd.authorise(key)
    asked: list[tuple[str, bool]] = []

    def prompt(text: str, echo: bool) -> str:
        asked.append((text, echo))
        return "open sesame"

    assert works(connect_to(sshd.settings(identity_files=(key,)), prompt=prompt))
    assert [(str(key) in text, echo) for text, echo in asked] == [(True, False)]


@pytest.mark.parametrize("arguments", [("-m", "PEM"), ("-m", "PKCS8")])
def test_keys_in_older_formats_work(
    connect_to: Connect, sshd: Sshd, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    key = make_key(tmp_path / "key", "rsa", extra=arguments)
    sshd.authorise(key)
    assert works(connect_to(sshd.settings(identity_files=(key,))))


def test_an_encrypted_key_without_a_terminal_is_told_apart_from_a_refusal(
    connect_to: Connect, sshd: Sshd, tmp_path: Path
) -> None:
    key = make_key(tmp_path / "key", passphrase="open sesame")
    sshd.authorise(key)
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(key,)), prompt=lambda text, echo: None)
    assert str(key) in str(caught.value)
    assert "terminal" in caught.value.action


def test_a_wrong_passphrase_is_refused_after_one_question(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key", passphrase="open sesame")
    sshd.authorise(key)
    asked: list[str] = []

    def prompt(text: str, echo: bool) -> str:
        asked.append(text)
        return "mistyped-4711"

    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(key,)), RetryPolicy(patience_s=30.0), prompt=prompt)
    assert str(key) in str(caught.value)
    assert "mistyped-4711" not in str(caught.value) + caught.value.details + caught.value.action
    assert len(set(asked)) == len(asked) == 1


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """A real ssh-agent's socket."""
    path = tmp_path / "agent"
    process = subprocess.Popen(
        [find_program("ssh-agent", "openssh-client"), "-D", "-a", str(path)], stdout=subprocess.DEVNULL
    )
    while not path.exists():
        assert process.poll() is None
    yield str(path)
    process.terminate()
    process.wait()


def add_to_agent(agent: str, key: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(key)], check=True, env={**os.environ, "SSH_AUTH_SOCK": agent}, timeout=60)


def test_a_key_in_the_agent_opens_the_door(connect_to: Connect, sshd: Sshd, tmp_path: Path, agent: str) -> None:
    key = make_key(tmp_path / "key")
    sshd.authorise(key)
    add_to_agent(agent, key)
    key.unlink()
    config = tmp_path / "config"
    config.write_text(f"Host *\n  IdentityAgent {agent}\n  IdentityFile {tmp_path}/none\n")
    assert works(connect_to(sshd.settings(identity_files=(), ssh_config_file=config)))


def test_identities_only_keeps_the_agents_other_keys_back(
    connect_to: Connect, sshd: Sshd, tmp_path: Path, agent: str
) -> None:
    key, other = make_key(tmp_path / "key"), make_key(tmp_path / "other")
    sshd.authorise(key)
    add_to_agent(agent, key)
    config = tmp_path / "config"
    config.write_text(f"Host *\n  IdentityAgent {agent}\n  IdentitiesOnly yes\n  IdentityFile {other}\n")
    with pytest.raises(LoginRefusedError) as caught:
        connect_to(sshd.settings(identity_files=(), ssh_config_file=config))
    assert fingerprint(key) not in caught.value.details
    # The agent's key is used where the configuration names it, even by its public half alone.
    key.unlink()
    config.write_text(f"Host *\n  IdentityAgent {agent}\n  IdentitiesOnly yes\n  IdentityFile {key}\n")
    assert works(connect_to(sshd.settings(identity_files=(), ssh_config_file=config)))


@pytest.mark.parametrize("how", ["jump", "two jumps", "command"])
def test_jump_hosts_are_gone_through_and_each_host_key_is_checked(
    connect_to: Connect, sshd: Sshd, tmp_path: Path, how: str
) -> None:
    with running_sshd(tmp_path / "bastion") as bastion:
        bastion.authorise(sshd.client_key)
        known = tmp_path / "known_hosts"
        config = tmp_path / "config"
        via = {
            "jump": "ProxyJump bastion",
            "two jumps": "ProxyJump bastion,again",
            "command": f"ProxyCommand ssh -F {config} -W '[%h]:%p' bastion",
        }[how]
        config.write_text(
            f"Host bastion\n  HostName {HOST}\n  Port {bastion.port}\n"
            f"Host again\n  HostName {HOST}\n  Port {bastion.port}\n"
            f"Host target\n  HostName {HOST}\n  Port {sshd.port}\n  {via}\n"
            f"Host *\n  User {getpass.getuser()}\n  UserKnownHostsFile {known}\n"
            f"  GlobalKnownHostsFile /dev/null\n  IdentityFile {sshd.client_key}\n  IdentitiesOnly yes\n"
        )
        settings = ConnectionSettings(host="target", ssh_config_file=config)
        known.write_text(bastion.known_hosts.read_text() + sshd.known_hosts.read_text())
        assert works(connect_to(settings))
        assert "Accepted publickey" in bastion.log
        known.write_text(bastion.known_hosts.read_text())
        with pytest.raises(HostKeyError):
            connect_to(settings)
        known.write_text(sshd.known_hosts.read_text())
        with pytest.raises((HostKeyError, UnreachableError)):
            connect_to(settings)


def test_a_port_where_nobody_listens_is_retried_with_the_reason_and_then_given_up(connect_to: Connect) -> None:
    settings = ConnectionSettings(host=HOST, port=free_port(), user="x", ssh_config_file=Path(os.devnull))
    notices: list[RetryNotice] = []
    with pytest.raises(UnreachableError) as caught:
        connect_to(settings, RetryPolicy(1.0, first_wait_s=0.05, longest_wait_s=0.2), on_retry=notices.append)
    assert "refuses connections" in str(caught.value)
    assert len(notices) >= 2
    assert [n.attempt for n in notices] == list(range(1, len(notices) + 1))
    assert all("refuses connections" in n.reason for n in notices)


def test_a_server_that_comes_back_within_the_patience_is_logged_in_to(connect_to: Connect, tmp_path: Path) -> None:
    from tests.support.sshd import start_sshd

    with running_sshd(tmp_path / "sshd") as first:
        settings, port = first.settings(), first.port
    servers: list[Sshd] = []

    def come_back(notice: RetryNotice) -> None:
        if not servers:
            servers.append(start_sshd(tmp_path / "sshd", port=port))

    try:
        assert works(connect_to(settings, RetryPolicy(LIMIT_S, first_wait_s=0.05), on_retry=come_back))
        assert servers
    finally:
        for server in servers:
            server.stop()


def test_an_unknown_name_is_told_as_such(connect_to: Connect) -> None:
    with pytest.raises(UnreachableError) as caught:
        connect_to(ConnectionSettings(host="no-such-host.invalid", user="x", ssh_config_file=Path(os.devnull)))
    assert "name" in str(caught.value)


@pytest.mark.parametrize("greeting", [b"", b"Exceeded MaxStartups\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_hangs_up_before_the_login_is_network_trouble(connect_to: Connect, greeting: bytes) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(greeting)

        threading.Thread(target=hang_up, daemon=True).start()
        settings = ConnectionSettings(
            host=HOST, port=listener.getsockname()[1], user="x", ssh_config_file=Path(os.devnull)
        )
        notices: list[RetryNotice] = []
        with pytest.raises(UnreachableError) as caught:
            connect_to(settings, RetryPolicy(0.5, first_wait_s=0.05, longest_wait_s=0.1), on_retry=notices.append)
        listener.shutdown(socket.SHUT_RDWR)
    assert "closed the connection before the login" in str(caught.value)
    assert notices


def test_a_server_that_says_nothing_is_given_up_in_time(connect_to: Connect) -> None:
    with socket.create_server((HOST, 0)) as listener:
        settings = ConnectionSettings(
            host=HOST,
            port=listener.getsockname()[1],
            user="x",
            ssh_config_file=Path(os.devnull),
            connect_timeout_s=1.0,
            banner_timeout_s=1.0,
            auth_timeout_s=1.0,
        )
        with pytest.raises(UnreachableError, match="in time"):
            connect_to(settings)


def test_a_broken_ssh_configuration_is_a_configuration_error(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  NoSuchOption yes\n")
    with pytest.raises(ConfigurationError) as caught:
        connect_to(sshd.settings(ssh_config_file=config))
    assert "nosuchoption" in caught.value.details.lower()


def test_no_failed_login_leaves_a_process_or_a_socket_behind(connect_to: Connect, sshd: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    threads = threading.active_count()
    with pytest.raises(AuthenticationError):
        connect_to(sshd.settings(identity_files=(stranger,)))
    folder = tmp_path / "s"
    assert not folder.exists() or list(folder.iterdir()) == []
    # A closed transport's thread ends within its socket's poll interval.
    for thread in threading.enumerate()[threads:]:
        thread.join(LIMIT_S)
    assert threading.active_count() <= threads


def test_the_host_key_that_is_known_is_asked_for_among_several(connect_to: Connect, tmp_path: Path) -> None:
    rsa = make_key(tmp_path / "rsa", "rsa")
    with running_sshd(tmp_path / "sshd", {"HostKey": f"{tmp_path}/sshd/host_key\nHostKey {rsa}"}) as server:
        server.known_hosts.write_text(f"[{HOST}]:{server.port} {public_half(rsa)}\n")
        assert works(connect_to(server.settings()))


def test_the_servers_banner_is_among_its_words_when_it_refuses(connect_to: Connect, tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("Accounts expire in June; renew at the front desk.\n")
    stranger = make_key(tmp_path / "stranger")
    with running_sshd(tmp_path / "sshd", {"Banner": str(banner)}) as server:
        assert works(connect_to(server.settings()))
        with pytest.raises(LoginRefusedError) as caught:
            connect_to(server.settings(identity_files=(stranger,)))
    assert "renew at the front desk" in caught.value.details


def test_a_server_that_refuses_another_session_is_told_as_trouble_and_recovers(
    connect_to: Connect, tmp_path: Path
) -> None:
    with running_sshd(tmp_path / "sshd", {"MaxSessions": "2"}) as server:
        transport = connect_to(server.settings())
        with (
            transport.open_stream("echo 1; exec cat", idle_timeout_s=LIMIT_S) as one,
            transport.open_stream("echo 2; exec cat", idle_timeout_s=LIMIT_S) as two,
        ):
            assert (one.read(2), two.read(2)) == (b"1\n", b"2\n")
            with pytest.raises(UnreachableError):
                transport.run("true", timeout_s=LIMIT_S)
            one.finish(LIMIT_S)
            two.finish(LIMIT_S)
        assert works(transport)


@pytest.mark.parametrize("transport_name", ["fabric"])
def test_a_session_that_the_server_still_counts_is_waited_for(tmp_path: Path, connect_to: Connect) -> None:
    with running_sshd(tmp_path / "sshd", {"MaxSessions": "1"}) as server:
        transport = connect_to(server.settings())
        with transport.open_stream("cat", idle_timeout_s=LIMIT_S) as stream, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(transport.run, "echo heard", timeout_s=LIMIT_S)
            until(lambda: "no more sessions" in server.log)
            stream.close_write()
            stream.finish(LIMIT_S)
            assert asked.result().stdout == b"heard\n"


def test_a_streams_login_under_way_ends_with_the_connection(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as listener:
        settings = ConnectionSettings(
            host=HOST,
            port=listener.getsockname()[1],
            user="x",
            ssh_config_file=Path(os.devnull),
            connect_timeout_s=200.0,
        )
        logins = BulkLogins(settings, read_effective_config(settings), tmp_path)
        ends: list[BaseException | None] = []

        def log_in() -> None:
            try:
                logins.open("exit 0\n", 200.0).read(1)
                ends.append(None)
            except ConnectionLostError as error:
                ends.append(error)

        thread = threading.Thread(target=log_in, daemon=True)
        thread.start()
        listener.settimeout(60.0)
        server, _ = listener.accept()  # which never says a word
        logins.close()
        thread.join(60.0)
        server.close()
        assert len(ends) == 1
        assert isinstance(ends[0], ConnectionLostError)
        with pytest.raises(ConnectionLostError):
            logins.open("exit 0\n", 200.0)
        assert list(tmp_path.iterdir()) == []
