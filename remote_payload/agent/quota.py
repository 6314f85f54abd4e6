"""How much of the user's quota is left where the node root lies: best effort, bounded."""

from __future__ import annotations

import os
from typing import Optional

from remote_payload.agent import root
from remote_payload.agent.commands import ask

_ASK_LIMIT_S = 5.0
_MOUNTS = "/proc/self/mounts"


def quota_free_bytes(path: str) -> Optional[int]:
    """Bytes left before a quota stops this user at `path`, or None where none is known."""
    _, device, kind = mount_of(path, _read_mounts())
    if kind == "lustre":
        text = ask(["lfs", "quota", "-q", "-u", str(os.geteuid()), path], _ASK_LIMIT_S)
    else:
        text = ask(["quota", "-w", "-v"], _ASK_LIMIT_S)
    return parse_quota(text, device, path) if text else None


def space_left(path: str) -> int:
    """Bytes that this user may still write at `path`: what is free there, or the quota's rest where that is less."""
    free = root.free_bytes(path)
    quota = quota_free_bytes(path)
    return free if quota is None else min(free, quota)


def disk_of(path: str) -> str:
    """The file system that holds `path`, in words."""
    folder, device, kind = mount_of(os.path.realpath(path), _read_mounts())
    return f"the disk at {folder} ({device}, {kind})" if folder else f"the disk of {path}"


def mount_of(path: str, mounts: str) -> tuple[str, str, str]:
    """(mount point, device, file system type) of the deepest mount that holds `path`, from the text of
    /proc/self/mounts."""
    best = ("", "", "")
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        folder = fields[1].replace("\\040", " ")
        holds = path == folder or path.startswith(folder.rstrip("/") + "/")
        if holds and len(folder) >= len(best[0]):
            best = (folder, fields[0], fields[2])
    return best


def parse_quota(text: str, *file_systems: str) -> Optional[int]:
    """Bytes left from `quota -w` or `lfs quota -q`: file system, KiB used, soft limit, hard limit, …

    A star behind the used blocks means over quota. A limit of 0 is none. None if no line speaks of `file_systems`.
    """
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 4 or fields[0] not in file_systems:
            continue
        numbers = [field.rstrip("*") for field in fields[1:4]]
        if not all(number.isdigit() for number in numbers):
            continue
        used, soft, hard = (int(number) for number in numbers)
        limits = [limit for limit in (soft, hard) if limit > 0]
        return max(0, (min(limits) - used) * 1024) if limits else None
    return None


def _read_mounts() -> str:
    try:
        with open(_MOUNTS, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
