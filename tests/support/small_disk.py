"""A node root on a disk that is small: a file system of its own, or the limits that stand in for one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from remote_payload.agent import quota
from tests.support.agent_streams import ProcessOpener, Wrap, make_node_root
from tests.support.sharing import mounted

MIB = 1024 * 1024
_START_LIMIT_S = 20


@dataclasses.dataclass
class SmallDisk:
    """`root`: the node root as the test sees it; `root_there` as the agents do, which `prefix` starts. `name`: what the
    agents call the disk."""

    root: Path
    root_there: Path
    prefix: list[str]
    name: str
    before_exec: Callable[[], None] | None = None

    def opener(self, wraps: Sequence[Wrap] = ()) -> ProcessOpener:
        agent = [*self.prefix, sys.executable, "-m", "remote_payload", "agent", "stream"]
        return ProcessOpener(self.root_there, lambda request: [*agent, request], wraps, before_exec=self.before_exec)

    @property
    def _ballast(self) -> Path:
        return self.root.parent / "ballast"

    def fill(self) -> None:
        """Somebody else takes all the space that there is."""
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(64 * 1024))

    def make_room(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[SmallDisk | None]:
    """A file system of `size` bytes, in a mount namespace that ends with this; None where this user may not."""
    mount_point = folder / "disk"
    mount_point.mkdir()
    script = f'mount -t tmpfs -o size={size},mode=700 tmpfs "$1" && echo mounted && exec sleep 600'
    for flags in (["-m"], ["-rm"]):
        holder = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", script, "sh", str(mount_point)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"mounted\n":
                continue
            enter = ["-m"] if flags == ["-m"] else ["-U", "--preserve-credentials", "-m"]
            prefix = ["nsenter", "-t", str(holder.pid), *enter, f"--wd={Path.cwd()}", "--"]
            outside = Path(f"/proc/{holder.pid}/root{mount_point}")
            root = make_node_root(outside)
            yield SmallDisk(root, mount_point / root.name, prefix, f"the disk at {mount_point} (tmpfs, tmpfs)")
            return
        finally:
            holder.kill()
            holder.wait(_START_LIMIT_S)
            holder.stdout.close()
    yield None


def quota_disk(folder: Path, size: int) -> SmallDisk:
    """A node root for whose user `quota` says that `size` bytes are the limit, as the real program says it."""
    root = make_node_root(folder)
    device = quota.disk_of(str(root)).rpartition("(")[2].partition(",")[0]
    program = folder / "bin" / "quota"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f"used=$(du -sk '{root}' | cut -f1)\n"
        "echo 'Disk quotas for user me (uid 1000):'\n"
        "echo '     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace'\n"
        f'echo "{device} $used {size // 1024} {size // 1024} 0 9 0 0 0"\n'
    )
    program.chmod(0o755)
    return SmallDisk(root, root, ["env", f"PATH={program.parent}:{os.environ['PATH']}"], quota.disk_of(str(root)))


class _Subvolume(SmallDisk):
    def fill(self) -> None:
        """It is full once its limit is reached."""

    def make_room(self) -> None:
        _btrfs("qgroup", "limit", "none", str(self.root.parent))


@contextlib.contextmanager
def silent_quota(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A node root under a real quota of `size` bytes, of which no program tells: a limit on a subvolume of Btrfs."""
    with mounted("btrfs", folder) as disk:
        _btrfs("quota", "enable", str(disk))
        subvolume = disk / "mine"
        _btrfs("subvolume", "create", str(subvolume))
        _btrfs("qgroup", "limit", str(size), str(subvolume))
        root = make_node_root(subvolume)
        yield _Subvolume(root, root, [], quota.disk_of(str(root)))


def _btrfs(*arguments: str) -> None:
    subprocess.run(["btrfs", *arguments], check=True, timeout=_START_LIMIT_S, stdout=subprocess.DEVNULL)


class _LimitedFiles(SmallDisk):
    def fill(self) -> None:
        """It is full from the beginning."""

    def make_room(self) -> None:
        self.before_exec = None


def limited_files(folder: Path, size: int) -> SmallDisk:
    """A node root whose agents may write no file longer than `size` until there is room."""
    root = make_node_root(folder)
    limit = (size, resource.RLIM_INFINITY)
    name = quota.disk_of(str(root))
    return _LimitedFiles(root, root, [], name, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
