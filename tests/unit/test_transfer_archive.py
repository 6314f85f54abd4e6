"""The code archive: exactly what git tracks, as it stands, the same bytes for everybody."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from orchestrator.errors import ConfigurationError
from orchestrator.layout import LocalLayout
from orchestrator.transfer import archive
from orchestrator.transfer.archive import pack_code


@pytest.fixture
def layout(tmp_path: Path) -> LocalLayout:
    return LocalLayout(tmp_path / "data", tmp_path / "config", tmp_path / "cache")


class Repository:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.git("init", "-q")
        self.git("config", "user.email", "a@b")
        self.git("config", "user.name", "a")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(self.root), *arguments], capture_output=True, check=True, timeout=60)
        return done.stdout.decode().strip()

    def write(self, name: str, content: bytes = b"x", mode: int = 0o644) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "all")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "the repo")


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_tracked_files_travel_as_they_stand_and_nothing_else_does(repository: Repository, layout: LocalLayout) -> None:
    repository.write("adapter.py", b"old")
    repository.write("lib/deep/er.py", b"deep")
    repository.write("other/no.py")
    sha = repository.commit()
    repository.write("adapter.py", b"new")
    repository.write("lib/untracked.py")
    packed = pack_code(repository.root, ["adapter.py", "lib"], layout)
    assert contents(packed.path) == {"adapter.py": b"new", "lib/deep/er.py": b"deep"}
    assert (packed.git_sha, packed.dirty, packed.untracked) == (sha, True, ("lib/untracked.py",))


def test_changes_elsewhere_do_not_make_the_code_dirty(repository: Repository, layout: LocalLayout) -> None:
    repository.write("lib/a.py")
    repository.write("notes.txt")
    repository.commit()
    repository.write("notes.txt", b"changed")
    assert not pack_code(repository.root, ["lib"], layout).dirty


def test_the_same_code_gives_the_same_bytes_in_another_place_at_another_time(
    tmp_path: Path, layout: LocalLayout
) -> None:
    digests = []
    for name, stamp in (("one", 1_000_000_000), ("two", 1_500_000_000)):
        repository = Repository(tmp_path / name)
        for file in ("b.py", "a.py", "ü b.py", "run.sh"):
            path = repository.write(
                file, file.encode(), 0o700 if file == "run.sh" else 0o664 if name == "one" else 0o600
            )
            os.utime(path, (stamp, stamp))
        repository.commit()
        digests.append(
            pack_code(repository.root, ["."] if name == "one" else ["a.py", "b.py", "ü b.py", "run.sh"], layout)
        )
    assert digests[0].sha256 == digests[1].sha256
    assert digests[0].path == digests[1].path
    with tarfile.open(digests[0].path) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted((m.name for m in members), key=os.fsencode)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}
    assert {m.name: m.mode for m in members}["run.sh"] == 0o755
    assert {m.name: m.mode for m in members}["a.py"] == 0o644


def test_a_folder_inside_of_a_repository_is_packed_relative_to_itself(
    repository: Repository, layout: LocalLayout
) -> None:
    repository.write("project/src/a.py", b"a")
    repository.write("src/b.py", b"b")
    repository.commit()
    assert contents(pack_code(repository.root / "project", ["src"], layout).path) == {"src/a.py": b"a"}


def test_odd_names_are_names(repository: Repository, layout: LocalLayout) -> None:
    names = ["*.py", "-rf", "a b'c\"d$(x).py", "new\nline.py", ":(top)x.py", "ü.py"]
    for name in names:
        repository.write(f"odd/{name}", name.encode())
    repository.write("odd/plain.py", b"plain")
    repository.commit()
    everything = contents(pack_code(repository.root, ["odd"], layout).path)
    assert everything == {f"odd/{name}": name.encode() for name in names} | {"odd/plain.py": b"plain"}
    assert list(contents(pack_code(repository.root, ["odd/*.py"], layout).path)) == ["odd/*.py"]


def test_a_tracked_file_that_was_deleted_is_left_out_and_makes_it_dirty(
    repository: Repository, layout: LocalLayout
) -> None:
    repository.write("lib/a.py")
    gone = repository.write("lib/b.py")
    repository.commit()
    gone.unlink()
    packed = pack_code(repository.root, ["lib"], layout)
    assert list(contents(packed.path)) == ["lib/a.py"]
    assert packed.dirty


def test_a_repository_without_a_commit_has_no_sha(repository: Repository, layout: LocalLayout) -> None:
    repository.write("a.py")
    repository.git("add", "a.py")
    packed = pack_code(repository.root, ["a.py"], layout)
    assert (packed.git_sha, packed.dirty) == (None, True)


def test_a_tracked_symbolic_link_is_refused_by_name(repository: Repository, layout: LocalLayout) -> None:
    repository.write("lib/a.py")
    (repository.root / "lib/link.py").symlink_to("/etc/passwd")
    repository.commit()
    with pytest.raises(ConfigurationError, match=r"lib/link\.py .* symbolic link"):
        pack_code(repository.root, ["lib"], layout)


def test_a_tracked_file_behind_a_link_that_came_later_is_refused(
    tmp_path: Path, repository: Repository, layout: LocalLayout
) -> None:
    repository.write("lib/a.py")
    repository.commit()
    (repository.root / "lib").rename(tmp_path / "elsewhere")
    (repository.root / "lib").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError):
        pack_code(repository.root, ["lib/a.py"], layout)


def test_a_tracked_file_that_became_a_link_is_refused(repository: Repository, layout: LocalLayout) -> None:
    path = repository.write("lib/a.py")
    repository.commit()
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ConfigurationError, match="symbolic link"):
        pack_code(repository.root, ["lib"], layout)


def test_a_tracked_file_that_became_a_pipe_is_refused_without_waiting(
    repository: Repository, layout: LocalLayout
) -> None:
    path = repository.write("lib/a.py")
    repository.commit()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigurationError, match="no regular file"):
        pack_code(repository.root, ["lib"], layout)


def test_a_submodule_is_refused(tmp_path: Path, repository: Repository, layout: LocalLayout) -> None:
    other = Repository(tmp_path / "other")
    other.write("a.py")
    sha = other.commit()
    repository.git("update-index", "--add", "--cacheinfo", f"160000,{sha},sub")
    with pytest.raises(ConfigurationError, match="submodule"):
        pack_code(repository.root, ["sub"], layout)


@pytest.mark.parametrize("path", ["/etc", "../x", "a/../../x", ""])
def test_a_path_that_leads_out_is_refused(repository: Repository, layout: LocalLayout, path: str) -> None:
    with pytest.raises(ConfigurationError):
        pack_code(repository.root, [path], layout)


def test_a_path_without_tracked_files_is_refused_with_the_fix(repository: Repository, layout: LocalLayout) -> None:
    repository.write("new.py")
    with pytest.raises(ConfigurationError) as caught:
        pack_code(repository.root, ["new.py"], layout)
    assert "git add new.py" in caught.value.action


def test_a_folder_outside_of_git_is_refused_with_the_fix(tmp_path: Path, layout: LocalLayout) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        pack_code(tmp_path / "plain", ["."], layout)
    assert "git init" in caught.value.action
    assert caught.value.details


def test_another_repository_in_the_environment_is_not_looked_at(
    tmp_path: Path, repository: Repository, layout: LocalLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.write("a.py", b"ours")
    repository.commit()
    other = Repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    assert contents(pack_code(repository.root, ["."], layout).path) == {"a.py": b"ours"}


def test_code_beyond_the_limit_is_refused(
    repository: Repository, layout: LocalLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_CODE_BYTES", 2_000_000)
    repository.write("a.bin", bytes(1_500_000))
    repository.write("b.bin", bytes(500_001))
    repository.commit()
    with pytest.raises(ConfigurationError, match=r"larger than 2 MB \(at b\.bin\)"):
        pack_code(repository.root, ["."], layout)
    assert list(layout.code_archives.iterdir()) == []


def test_an_archive_that_is_there_stays_the_same_file_and_a_damaged_one_is_made_anew(
    repository: Repository, layout: LocalLayout
) -> None:
    repository.write("a.py", b"one")
    repository.commit()
    first = pack_code(repository.root, ["a.py"], layout).path
    inode, data = first.stat().st_ino, first.read_bytes()
    assert pack_code(repository.root, ["a.py"], layout).path.stat().st_ino == inode
    first.write_bytes(data[:-1])
    assert pack_code(repository.root, ["a.py"], layout).path.read_bytes() == data
    assert [path.name for path in layout.code_archives.iterdir()] == [first.name]


def test_old_archives_are_forgotten(repository: Repository, layout: LocalLayout) -> None:
    for number in range(archive._KEPT_ARCHIVES + 3):
        repository.write("a.py", str(number).encode())
        repository.git("add", "a.py")
        last = pack_code(repository.root, ["a.py"], layout)
    kept = list(layout.code_archives.glob("*.tar"))
    assert len(kept) == archive._KEPT_ARCHIVES
    assert last.path in kept
