"""Whether a node may be asked to log in to another, and where to."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigurationError
from orchestrator.profiles import ClusterProfile
from orchestrator.transfer.direct import login_between


def profile(tmp_path: Path, config: str = "", **changes: Any) -> ClusterProfile:
    path = tmp_path / "config"
    path.write_text(config)
    return ClusterProfile.model_validate({"host": "lab", "ssh_config_file": str(path), **changes})


def test_the_address_is_what_the_alias_means_here(tmp_path: Path) -> None:
    config = "Host lab\n  HostName lab.example.org\n  User me\n  Port 2200\n  IdentityFile ~/.ssh/secret\n"
    login = login_between(profile(tmp_path), profile(tmp_path, config, connect_timeout_s=60))
    assert (login.host, login.user, login.port, login.connect_timeout_s) == ("lab.example.org", "me", 2200, 10.0)


def test_without_a_word_about_it_the_user_is_the_one_that_we_log_in_as(tmp_path: Path) -> None:
    login = login_between(profile(tmp_path), profile(tmp_path))
    assert (login.host, login.user, login.port) == ("lab", getpass.getuser(), 22)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ("Host lab\n  ProxyJump gate\n", {}, "another host"),
        ("Host lab\n  ProxyCommand nc %h %p\n", {}, "another host"),
        ("", {"direct_copies": False}, "direct_copies"),
        ("", {"host": None, "embedded": True}, "this machine"),
        ("", {"user": "DOMAIN\\me"}, "login name"),
        ("Host lab\n  HostName a/b\n", {}, "host"),
    ],
)
def test_a_way_that_only_this_machine_knows_or_that_is_not_wanted_is_not_tried(
    tmp_path: Path, config: str, changes: dict[str, Any], reason: str
) -> None:
    near = profile(tmp_path)
    with pytest.raises(ConfigurationError, match=reason):
        login_between(near, profile(tmp_path, config, **changes))


def test_either_profile_forbids_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="direct_copies"):
        login_between(profile(tmp_path, direct_copies=False), profile(tmp_path))
