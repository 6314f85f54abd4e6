"""Configs and project files: ours are validated, the user's own pass through, foreign ones are not trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.config import LoadedConfig, load_config
from orchestrator.errors import ConfigurationError
from orchestrator.project import find_project


def load(path: Path, **variables: str) -> LoadedConfig:
    return load_config(path, num_samples=3, adapter="p:A", variables=variables, data_base=None)


def test_an_unknown_key_of_the_section_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("lr: 1\nremote_eval:\n  sede: 1\n")
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:3: field 'remote_eval.sede': unknown key"
    assert caught.value.action == "Did you mean 'seed'?"


@pytest.mark.parametrize("text", ["lr: 0.1\nepochs: 3\n", "[tool]\nx = 1\n", "a: [\n", "just text", ""])
def test_a_config_of_the_users_own_reaches_the_adapter_untouched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.cfg"
    path.write_text(text)
    settings = load(path).settings
    assert (settings.user_config_text, settings.user_config_name, settings.adapter) == (text, "train.cfg", "p:A")


def test_a_broken_file_with_our_section_is_an_error_not_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("remote_eval:\n  seed: [\n")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        load(path)


def test_the_configs_adapter_goes_before_the_projects(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("remote_eval:\n  adapter: q.r:B\n")
    assert load(path).settings.adapter == "q.r:B"


def test_data_paths_take_the_clusters_variables_and_refuse_unknown_ones(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("remote_eval:\n  data: {film: '${SCRATCH}/film'}\n")
    assert load(path, SCRATCH="/s").settings.data == {"film": "/s/film"}
    with pytest.raises(ConfigurationError, match="no variable 'SCRATCH'"):
        load(path)


def test_a_relative_data_path_is_refused_for_a_real_node(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("remote_eval:\n  data: {film: film}\n")
    with pytest.raises(ConfigurationError, match="relative"):
        load(path)


def project_at(folder: Path, text: str = "cluster: tensor02\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "remote-eval.yaml"
    path.write_text(text)
    path.chmod(0o644)
    folder.chmod(0o755)
    return path


def test_the_project_file_is_found_upwards_and_not_beyond_the_repository(tmp_path: Path) -> None:
    project_at(tmp_path)
    inner = tmp_path / "repo" / "a" / "b"
    inner.mkdir(parents=True)
    assert find_project(inner).file.cluster == "tensor02"
    (tmp_path / "repo" / ".git").mkdir()
    assert find_project(inner).path is None


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_project_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    project_at(tmp_path).chmod(mode)
    with pytest.raises(ConfigurationError, match="somebody else"):
        find_project(tmp_path)


def test_a_project_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    project_at(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="somebody else"):
        find_project(tmp_path)


@pytest.mark.parametrize("jobs", ["{health: 'a:b'}", "{'../x': 'a:b'}", "{probe: 'a b'}", "{probe: 'a'}"])
def test_a_job_that_cannot_be_named_so_is_refused(tmp_path: Path, jobs: str) -> None:
    project_at(tmp_path, f"jobs: {jobs}\n")
    with pytest.raises(ConfigurationError):
        find_project(tmp_path)


def test_a_folder_without_a_project_file_is_a_project_of_its_own(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    project = find_project(tmp_path)
    assert (project.folder, project.path) == (Path(os.path.realpath(tmp_path)), None)
