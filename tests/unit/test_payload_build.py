"""The zipapp is the same wherever it is built, and speaks up where it cannot run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import remote_payload
from orchestrator.errors import UsageError
from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload, payload_for

SOURCE = Path(next(iter(remote_payload.__path__)))
BUILD = """
import sys
from pathlib import Path
from orchestrator.layout import LocalLayout
from orchestrator.payload import build_payload
base = Path(sys.argv[1])
print(build_payload(LocalLayout(base / "d", base / "c", base / "k")).path)
"""


def layout_in(base: Path) -> LocalLayout:
    return LocalLayout(base / "data", base / "config", base / "cache")


def test_two_builds_in_other_folders_under_other_umasks_are_the_same_bytes(tmp_path: Path) -> None:
    built = []
    for name, umask in (("one", "022"), ("two", "077")):
        copy = tmp_path / name / "source"
        copy.mkdir(parents=True)
        for package in ("remote_payload", "orchestrator"):
            shutil.copytree(SOURCE.parent / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        if name == "two":
            for path in sorted(copy.rglob("*.py"), reverse=True):
                os.utime(path, (1, 1))
                path.chmod(0o700)
            (copy / "remote_payload" / "__pycache__").mkdir(exist_ok=True)
            (copy / "remote_payload" / "__pycache__" / "x.pyc").write_bytes(b"x")
            (copy / "remote_payload" / ".editor.swp").write_bytes(b"x")
        script = f'umask {umask}; exec "$0" -c "$1" "$2"'
        done = subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, BUILD, str(tmp_path / name)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "TZ": "Asia/Tokyo" if name == "two" else "UTC"},
            capture_output=True,
            check=True,
            timeout=60,
        )
        built.append(Path(done.stdout.decode().strip()))
    assert built[0].read_bytes() == built[1].read_bytes()
    assert built[0].name == hashlib.sha256(built[0].read_bytes()).hexdigest() + ".pyz"
    assert built[0].stat().st_mode & 0o077 == 0


def test_the_payload_holds_every_module_uncompressed_and_nothing_else(tmp_path: Path) -> None:
    payload = build_payload(layout_in(tmp_path))
    with zipfile.ZipFile(payload.path) as archive:
        members = archive.infolist()
    modules = {str(path.relative_to(SOURCE.parent)) for path in SOURCE.rglob("*.py")}
    assert modules | {"__main__.py"} <= {member.filename for member in members}
    assert all(member.compress_type == zipfile.ZIP_STORED for member in members)
    assert not [member.filename for member in members if "__pycache__" in member.filename or "/." in member.filename]
    assert payload.size == payload.path.stat().st_size


def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path: Path) -> None:
    payload = build_payload(layout_in(tmp_path))
    payload.path.write_bytes(b"damaged")
    again = build_payload(layout_in(tmp_path))
    assert hashlib.sha256(again.path.read_bytes()).hexdigest() == payload.sha256


def test_an_old_runs_payload_comes_from_the_cache_or_is_refused(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    current = build_payload(layout)
    assert payload_for(current.sha256, layout) == current
    old = hashlib.sha256(b"an older payload").hexdigest()
    with pytest.raises(UsageError, match="another version"):
        payload_for(old, layout)
    (layout.payloads / f"{old}.pyz").write_bytes(b"an older payload")
    assert payload_for(old, layout).path.read_bytes() == b"an older payload"
    (layout.payloads / f"{old}.pyz").write_bytes(b"an older payload, damaged")
    with pytest.raises(UsageError, match="another version"):
        payload_for(old, layout)


def entry_under_an_old_python(tmp_path: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the zipapp's own entry as an older Python would see it."""
    payload = build_payload(layout_in(tmp_path))
    with zipfile.ZipFile(payload.path) as archive:
        entry = archive.read("__main__.py").decode()
    program = (
        "import sys\n"
        "class Version(tuple): pass\n"
        "sys.version_info = Version((3, 6, 8))\n"
        f"sys.argv = {['payload.pyz', *arguments]!r}\n"
        f"exec(compile({entry!r}, '__main__.py', 'exec'), {{'__name__': '__main__'}})\n"
    )
    return subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("by_stdin", [False, True])
def test_a_python_that_is_too_old_says_so_in_a_framed_reply(tmp_path: Path, by_stdin: bool) -> None:
    nonce = "ab" * 16
    request = base64.b64encode(json.dumps({"verb": "hello", "nonce": nonce}).encode()).decode()
    done = entry_under_an_old_python(tmp_path, "agent", "call", "-" if by_stdin else request, text=request)
    assert done.returncode == 0, done.stderr
    from remote_payload.wire.frames import decode_reply

    _, reply, noise = decode_reply(nonce, done.stdout.encode())
    assert reply["error"]["kind"] == "unfit"
    assert "Python 3.6 is older than 3.9" in reply["error"]["message"]
    assert noise == b""


def test_a_python_that_is_too_old_says_so_on_standard_error_by_hand(tmp_path: Path) -> None:
    done = entry_under_an_old_python(tmp_path, "health")
    assert done.returncode == 2
    assert "older than 3.9" in done.stderr
