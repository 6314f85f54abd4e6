"""The scripts that reach the agent, run by real shells."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import node_script as scripts
from orchestrator.profiles import ContainerProfile, PythonProfile
from remote_payload.wire.layout import MARKER_NAME

NONCE = "0123456789abcdef" * 2
HOSTILE = [
    "plain",
    "with space",
    "quote'and\"both",
    "$(touch pwned)",
    "`touch pwned`",
    "new\nline",
    "naïve-日本",
    "a;b&c|d",
    "-n",
]
SHELLS = ["/bin/sh", "/bin/dash", "/bin/bash"]


def run(shell: str, script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [shell],
        input=script.encode(),
        capture_output=True,
        cwd=cwd,
        timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), **environment},
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_no_character_of_a_path_is_anything_but_itself(tmp_path: Path, shell: str, name: str) -> None:
    script = f"printf %s {scripts.expandable('~/' + name.replace('$', '$'))}\n"
    if name.startswith("$("):
        script = f"printf %s {scripts.expandable('/x/' + name)}\n"
    done = run(shell, script, tmp_path)
    assert not (tmp_path / "pwned").exists()
    expected = f"/x/{name}" if name.startswith("$(") else f"{tmp_path}/{name}"
    assert done.stdout.decode() == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_only_home_and_named_variables_expand(tmp_path: Path, shell: str) -> None:
    word = scripts.expandable("$SCRATCH/${USER_NAME}/~/x*")
    done = run(shell, f"printf %s {word}\n", tmp_path, SCRATCH="/s p", USER_NAME="$(id)")
    assert done.stdout.decode() == "/s p/$(id)/~/x*"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_the_payload_lands_verified_in_any_root(tmp_path: Path, shell: str, name: str) -> None:
    payload = os.urandom(300_000)
    sha = hashlib.sha256(payload).hexdigest()
    root = f"~/{name}" if not name.startswith("$(") else str(tmp_path / name)
    python = PythonProfile(path=sys.executable)
    script = scripts.install_script(python, root, sha, NONCE, payload, MARKER_NAME)
    done = run(shell, script, tmp_path)
    assert scripts.outcome_said(NONCE, done.stdout) == scripts.INSTALLED, done.stderr
    landed = tmp_path / name / "payloads" / f"{sha}.pyz"
    assert landed.read_bytes() == payload
    assert (tmp_path / name / MARKER_NAME).exists()
    assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_a_root_that_holds_somebody_elses_files_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "theirs"
    root.mkdir()
    (root / "thesis.tex").write_text("x")
    sha = hashlib.sha256(b"p").hexdigest()
    script = scripts.install_script(PythonProfile(path=sys.executable), str(root), sha, NONCE, b"p", MARKER_NAME)
    assert scripts.outcome_said(NONCE, run("/bin/sh", script, tmp_path).stdout) == scripts.ROOT_FOREIGN
    assert [p.name for p in root.iterdir()] == ["thesis.tex"]


def test_a_damaged_payload_never_stands_at_its_place(tmp_path: Path) -> None:
    script = scripts.install_script(
        PythonProfile(path=sys.executable), str(tmp_path / "root"), "0" * 64, NONCE, b"payload", MARKER_NAME
    )
    assert scripts.outcome_said(NONCE, run("/bin/sh", script, tmp_path).stdout) == scripts.INSTALL_DAMAGED
    assert not list((tmp_path / "root" / "payloads").iterdir())


@pytest.mark.parametrize(
    ("python", "outcome"),
    [
        (PythonProfile(path="/no/such/python"), scripts.PYTHON_MISSING),
        (PythonProfile(modules=["cuda/12"]), scripts.MODULES_MISSING),
        (PythonProfile(conda_env="ml"), scripts.CONDA_MISSING),
        (
            PythonProfile(container=ContainerProfile(runtime="apptainer", image="/i.sif")),
            scripts.RUNTIME_MISSING,
        ),
    ],
)
def test_what_the_node_lacks_is_said_by_name(tmp_path: Path, python: PythonProfile, outcome: str) -> None:
    script = scripts.call_script(python, str(tmp_path), "0" * 64, NONCE, "e30=")
    assert scripts.outcome_said(NONCE, run("/bin/sh", script, tmp_path).stdout) == outcome


@pytest.mark.parametrize("shell", SHELLS)
def test_environment_modules_and_conda_are_applied_before_python_is_looked_up(tmp_path: Path, shell: str) -> None:
    tool = tmp_path / "tool"
    tool.mkdir()
    conda = tool / "conda"
    conda.write_text('#!/bin/sh\necho "conda() { PATH=$HOME/env/bin:\\$PATH; }"\n')
    conda.chmod(0o755)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "envpython").symlink_to(sys.executable)
    python = PythonProfile(path="envpython", conda_env="my env")
    script = scripts.call_script(python, str(tmp_path), "0" * 64, NONCE, "e30=")
    done = run(shell, script, tmp_path, PATH=f"{tool}:{os.environ['PATH']}")
    assert scripts.outcome_said(NONCE, done.stdout) == scripts.PAYLOAD_MISSING, done.stderr


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_a_container_gets_the_root_and_the_script_as_plain_arguments(tmp_path: Path, runtime: str) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / runtime).write_text('#!/bin/sh\nfor a in "$@"; do printf "<%s>" "$a"; done\n')
    (fake / runtime).chmod(0o755)
    root = tmp_path / "my root"
    (root / "payloads").mkdir(parents=True)
    (root / "payloads" / ("0" * 64 + ".pyz")).touch()
    container = ContainerProfile(runtime=runtime, image="/img with space.sif", options=["--env", "A=$(id)"])  # type: ignore[arg-type]
    script = scripts.call_script(PythonProfile(container=container), str(root), "0" * 64, NONCE, "e30=")
    out = run("/bin/sh", script, tmp_path, PATH=f"{fake}:{os.environ['PATH']}").stdout.decode()
    assert "<--env><A=$(id)></img with space.sif><python3>" in out
    assert str(root) in out


@pytest.mark.parametrize("shell", SHELLS)
def test_bytes_behind_a_stream_script_are_never_run_as_commands(tmp_path: Path, shell: str) -> None:
    (tmp_path / "payloads").mkdir()
    (tmp_path / "payloads" / ("0" * 64 + ".pyz")).write_text("import sys; sys.exit(0)")
    script = scripts.stream_script(PythonProfile(path=sys.executable), str(tmp_path), "0" * 64, NONCE, "e30=")
    done = run(shell, script + "touch pwned\n" * 10_000, tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "pwned").exists()


def test_a_request_stands_in_no_argument_of_any_process(tmp_path: Path) -> None:
    secret = base64.b64encode(b"secret").decode()
    script = scripts.call_script(PythonProfile(path=sys.executable), str(tmp_path), "0" * 64, NONCE, secret)
    assert [line for line in script.splitlines() if secret in line] == [secret]
