"""Cluster profiles: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from orchestrator.errors import ConfigurationError
from orchestrator.layout import LocalLayout
from orchestrator.profiles import find_profiles, json_schema, load_profile


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("hots: x\n", 1, "hots"),
        ("host: x\ngpu:\n  cuont: 3\n", 3, "gpu.cuont"),
        ("host: x\n\nport: 70000\n", 3, "port"),
        ("host: x\nbudgets_s:\n  load: -1\n", 3, "budgets_s.load"),
        ("host: x\npython:\n  modules:\n    - a\n    - [b]\n", 5, "python.modules.1"),
        ("host: -oProxyCommand=touch\n", 1, "host"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(
    tmp_path: Path, layout: LocalLayout, text: str, line: int, field: str
) -> None:
    path = write(tmp_path / "p", "bad", text)
    with pytest.raises(ConfigurationError) as caught:
        load_profile(str(path), layout, None)
    assert str(caught.value).startswith(f"{path}:{line}: field '{field}'")


def test_an_unknown_cluster_is_answered_with_the_nearest_names(layout: LocalLayout) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_profile("tensor2", layout, None)
    assert "Did you mean tensor02?" in caught.value.action


def test_the_project_goes_before_the_user_and_the_user_before_what_comes_with_us(
    tmp_path: Path, layout: LocalLayout
) -> None:
    project = tmp_path / "project"
    write(layout.user_profiles, "tensor02", "host: the-users\n")
    assert load_profile("tensor02", layout, project).profile.host == "the-users"
    write(project / "cluster_profiles", "tensor02", "host: the-projects\n")
    assert load_profile("tensor02", layout, project).profile.host == "the-projects"


def test_extends_fills_in_what_the_profile_leaves_open_and_nothing_else(tmp_path: Path, layout: LocalLayout) -> None:
    write(layout.user_profiles, "base", "host: a\nuser: u\ngpu: {count: 4, allow_shared: true}\n")
    write(layout.user_profiles, "mine", "extends: base\nhost: b\ngpu: {count: 1}\n")
    profile = load_profile("mine", layout, None).profile
    assert (profile.host, profile.user, profile.gpu.count, profile.gpu.allow_shared) == ("b", "u", 1, True)


def test_a_profile_may_extend_the_one_of_the_same_name_that_it_hides(layout: LocalLayout) -> None:
    write(layout.user_profiles, "a", "extends: b\nhost: x\n")
    write(layout.user_profiles, "b", "extends: a\n")
    with pytest.raises(ConfigurationError, match="circle"):
        load_profile("a", layout, None)


def test_a_yaml_tag_constructs_no_object(tmp_path: Path, layout: LocalLayout) -> None:
    marker = tmp_path / "made"
    path = write(tmp_path, "evil", f"host: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ConfigurationError):
        load_profile(str(path), layout, None)
    assert not marker.exists()


def test_every_profile_that_comes_with_us_is_valid_by_the_published_schema(layout: LocalLayout) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    for name, path in find_profiles(layout, None).items():
        load_profile(name, layout, None)
        validator.validate(yaml.safe_load(path.read_text()))


def test_the_schema_refuses_an_unknown_key_as_we_do() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not validator.is_valid({"host": "x", "hots": "y"})
