"""The user's code as one reproducible archive: what git tracks, as it stands in the working tree."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import ConfigurationError
from orchestrator.layout import LocalLayout
from remote_payload.wire.names import printable

MAX_CODE_BYTES = 100 * 1000 * 1000
MAX_CODE_FILES = 20_000
_KEPT_ARCHIVES = 20
_GIT_TIMEOUT_S = 60.0
_REGULAR_MODES = ("100644", "100755")
# Set by git hooks and the like, these would make git look at another repository than the folder's own.
_FOREIGN_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")


@dataclasses.dataclass(frozen=True)
class CodeArchive:
    """`dirty`: the working tree differs from `git_sha` below the paths. `untracked` files there are not in it.

    `git_sha` None: there is no commit yet.
    """

    path: Path
    sha256: str
    git_sha: str | None
    dirty: bool
    untracked: tuple[str, ...] = ()


def pack_code(repository_root: Path, paths: Sequence[str], layout: LocalLayout) -> CodeArchive:
    """Pack the git-tracked files below `paths` (relative to `repository_root`) into an uncompressed tar in the cache.

    The same contents give the same bytes, whoever packs them, when and where. Raises `ConfigurationError`: no git
    repository, a path without tracked files, a symbolic link, a submodule, or more than `MAX_CODE_BYTES`.
    """
    if not paths:
        raise ConfigurationError("no code to ship was named", action="List folders or files under `code:`.")
    git = _Git(repository_root)
    names = _tracked_files(git, paths)
    status = git.ask("status", "--porcelain", "-z", "--untracked-files=no", "--", *paths)
    untracked = git.ask("ls-files", "-z", "--others", "--exclude-standard", "--", *paths)
    path, sha256 = _write_archive(repository_root, names, layout)
    return CodeArchive(path, sha256, git.head(), bool(status), tuple(_split(untracked)))


class _Git:
    """Questions to git about one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN_GIT_VARIABLES}
        self._environment = {**kept, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}

    def ask(self, *arguments: str) -> bytes:
        result = self._run(arguments)
        if result.returncode != 0:
            said = printable(result.stderr.decode(errors="replace")).strip()
            raise ConfigurationError(
                f"git cannot tell which files of {self._folder} belong to the code",
                action="Ship code from a git repository (`git init && git add …`), with paths inside of it.",
                details=said,
            )
        return result.stdout

    def head(self) -> str | None:
        result = self._run(["rev-parse", "--verify", "--quiet", "HEAD"])
        return result.stdout.decode().strip() if result.returncode == 0 else None

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        command = ["git", "--literal-pathspecs", "-C", str(self._folder), *arguments]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._environment,
                timeout=_GIT_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            raise ConfigurationError("git is not installed here", action="Install git.") from None
        except subprocess.TimeoutExpired:
            raise ConfigurationError(
                f"git did not answer within {_GIT_TIMEOUT_S:g} s about {self._folder}",
                action="Look whether `git status` works there.",
            ) from None


def _tracked_files(git: _Git, paths: Sequence[str]) -> list[str]:
    """Names relative to the folder, sorted by their bytes."""
    names: set[str] = set()
    for path in paths:
        if not path or path.startswith("/") or ".." in path.split("/"):
            raise ConfigurationError(
                f"the code path {path!r} does not lie below the project's folder", action="Write a relative path."
            )
        found = [_plain_name(entry) for entry in _split(git.ask("ls-files", "-z", "--stage", "--", path))]
        if not found:
            raise ConfigurationError(
                f"git tracks no file at the code path {path!r}",
                action=f"Correct the path, or run `git add {path}`.",
            )
        names.update(found)
    if len(names) > MAX_CODE_FILES:
        raise ConfigurationError(
            f"the code has {len(names)} files, {MAX_CODE_FILES} are the limit", action="Name fewer paths under `code:`."
        )
    return sorted(names, key=os.fsencode)


def _plain_name(entry: str) -> str:
    """The name in a line `<mode> <object> <stage>\\t<name>` of `git ls-files --stage`."""
    facts, _, name = entry.partition("\t")
    mode = facts.split(" ", 1)[0]
    if mode not in _REGULAR_MODES:
        kind = {"120000": "a symbolic link", "160000": "a submodule"}.get(mode, f"of mode {mode}")
        raise ConfigurationError(
            f"{name} in the code to ship is {kind}, which does not travel",
            action="Replace it by the files themselves, or name paths without it under `code:`.",
        )
    return name


def _write_archive(root: Path, names: Sequence[str], layout: LocalLayout) -> tuple[Path, str]:
    folder = layout.make_private(layout.code_archives)
    real_root = os.path.realpath(root)
    descriptor, temporary_name = tempfile.mkstemp(prefix=".packing-", dir=folder)
    temporary = Path(temporary_name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                total = 0
                for name in names:
                    content = _content(real_root, name, MAX_CODE_BYTES - total)
                    if content is not None:
                        total += len(content[0])
                        archive.addfile(_member(name, *content), io.BytesIO(content[0]))
            file.flush()
            os.fsync(file.fileno())
            sha256 = _sha256(file)
        final = folder / f"{sha256}.tar"
        if _is_packed_already(final, sha256):  # and may be being read by another run: it stays the same file
            temporary.unlink()
        else:
            temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _forget_old(folder, final)
    return final, sha256


def _content(real_root: str, name: str, room_bytes: int) -> tuple[bytes, bool] | None:
    """(bytes, executable) of a tracked file as it stands; None where it was deleted."""
    path = f"{real_root.rstrip('/')}/{name}"
    if os.path.realpath(path) != path:
        raise ConfigurationError(
            f"{name} in the code to ship is a symbolic link, or lies behind one, which does not travel",
            action="Replace it by the files themselves, or name paths without it under `code:`.",
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigurationError(f"{name} in the code to ship cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigurationError(f"{name} in the code to ship is no regular file")
        data = file.read(room_bytes + 1)
    if len(data) > room_bytes:
        raise ConfigurationError(
            f"the code to ship is larger than {MAX_CODE_BYTES // 1_000_000} MB (at {name})",
            action="Name fewer paths under `code:`; data belongs on the node, named in the config.",
        )
    return data, bool(facts.st_mode & stat.S_IXUSR)


def _member(name: str, data: bytes, is_executable: bool) -> tarfile.TarInfo:
    """Nothing of who packed it, when, or on what machine."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o755 if is_executable else 0o644
    return member


def _is_packed_already(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return _sha256(file) == sha256
    except OSError:
        return False


def _sha256(file: io.BufferedIOBase) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _forget_old(folder: Path, current: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else tidies up at the same time
        archives = sorted(folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in archives[_KEPT_ARCHIVES:]:
            if old != current:
                old.unlink()


def _split(listing: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]
