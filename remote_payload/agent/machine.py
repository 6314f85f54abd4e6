"""Which machine this is, which boot of it, and which processes run on it. /proc where there is one, else `ps`."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from typing import Optional

from remote_payload.agent.commands import ask
from remote_payload.wire.states import ProcessIdentity

_ASK_LIMIT_S = 5.0
_HAS_PROC = os.path.exists("/proc/self/stat")


@functools.cache
def machine_id() -> str:
    """An opaque id of this machine as far as process ids reach.

    The host name is part of it because diskless clusters boot every node from one image, machine-id included; the pid
    namespace is part of it because inside a container the same pids mean other processes.
    """
    parts = [_first_line("/etc/machine-id") or _hardware_uuid(), platform.node(), _pid_namespace()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def boot_id() -> str:
    """An id that changes with every start of the machine; empty where the system tells none."""
    from_kernel = _first_line("/proc/sys/kernel/random/boot_id")
    if from_kernel:
        return from_kernel
    for name in ("kern.bootsessionuuid", "kern.boottime"):
        answer = ask(["sysctl", "-n", name], _ASK_LIMIT_S)
        if answer and answer.strip():
            return answer.strip()
    return ""


def identity(pid: int) -> Optional[ProcessIdentity]:
    """The process `pid` as it is now, or None if there is none (a zombie is none)."""
    started = start_time(pid)
    return None if started is None else ProcessIdentity(pid, started, boot_id(), machine_id())


def is_alive(process: ProcessIdentity) -> Optional[bool]:
    """Whether that very process still runs; None where it belongs to another machine and cannot be told from here."""
    if process.machine_id != machine_id():
        return None
    if process.boot_id != boot_id():
        return False
    return start_time(process.pid) == process.start_time


def start_time(pid: int) -> Optional[str]:
    """When `pid` started, in the system's own notation; None if there is no such process or only its zombie."""
    return _start_time_from_proc(pid) if _HAS_PROC else _start_time_from_ps(pid)


def processes_with_argument(argument: str) -> tuple[ProcessIdentity, ...]:
    """Running processes whose command line holds `argument` as a word, without this one."""
    found = []
    for pid, words in _command_lines():
        if pid != os.getpid() and argument in words:
            process = identity(pid)
            if process is not None:
                found.append(process)
    return tuple(found)


def _command_lines() -> Iterator[tuple[int, list[str]]]:
    if not _HAS_PROC:
        yield from _command_lines_from_ps()
        return
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read(1 << 20).split(b"\0")
        except OSError:
            continue
        yield int(name), [word.decode("utf-8", "surrogateescape") for word in words]


def _command_lines_from_ps() -> Iterator[tuple[int, list[str]]]:
    listing = ask(["ps", "-axww", "-o", "pid=", "-o", "command="], _ASK_LIMIT_S) or ""
    for line in listing.splitlines():
        pid, _, command = line.strip().partition(" ")
        if pid.isdigit():
            yield int(pid), command.split()


def _start_time_from_proc(pid: int) -> Optional[str]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read(4096).decode("ascii", "replace")
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything, brackets and spaces included.
    fields = text[text.rfind(")") + 1 :].split()
    if len(fields) < 20 or fields[0] in ("Z", "X", "x"):
        return None
    return fields[19]


def _start_time_from_ps(pid: int) -> Optional[str]:
    answer = ask(["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)], _ASK_LIMIT_S)
    state, _, started = (answer or "").strip().partition(" ")
    return started.strip() if started and not state.startswith("Z") else None


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(256).strip()
    except OSError:
        return ""


def _hardware_uuid() -> str:
    answer = ask(["ioreg", "-rd1", "-c", "IOPlatformExpertDevice"], _ASK_LIMIT_S) or ""
    match = re.search(r'"IOPlatformUUID" = "([0-9A-Fa-f-]{8,64})"', answer)
    return match.group(1) if match else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
