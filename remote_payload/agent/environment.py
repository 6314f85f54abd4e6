"""The node's environment: what is recorded of it, what a job inherits, and a snapshot of a moment in trouble."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

from remote_payload.agent import own_code
from remote_payload.wire.names import printable

_RECORDED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LANG|LC_[A-Z]+|TZ|HOSTNAME|SHELL|VIRTUAL_ENV|LOADEDMODULES"
    r"|(CUDA|CUBLAS|CUDNN|NCCL|NVIDIA|OMP|MKL|OPENBLAS|NUMEXPR|TORCH|PYTORCH|PYTHON|CONDA|SLURM|XLA)_?[A-Z0-9_]*)\Z"
)
_SECRET = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
_OF_THE_LOGIN = ("SSH_AUTH_SOCK", "SSH_AGENT_PID", "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "DISPLAY", "XAUTHORITY")
_OURS = "REMOTE_EVAL_"


def recorded(variables: Mapping[str, str]) -> dict[str, Any]:
    """`environment.json`: interpreter, platform and allow-listed variables. Nothing is named like a secret."""
    return {
        "schema": 1,
        "python_version": platform.python_version(),
        "python_executable": sys.executable,
        "platform": platform.platform(),
        "hostname": platform.node(),
        "processors": os.cpu_count(),
        "variables": {
            name: printable(value)
            for name, value in sorted(variables.items())
            if _RECORDED.match(name) and not _SECRET.search(name)
        },
    }


def for_job(variables: Mapping[str, str]) -> dict[str, str]:
    """What a job inherits: all but what belongs to the login that started the supervisor."""
    kept = {
        name: value for name, value in variables.items() if name not in _OF_THE_LOGIN and not name.startswith(_OURS)
    }
    # Logs appear as they are written, the shipped code's folder stays as it was unpacked, and sets of strings have the
    # same order in every run.
    kept.update(PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1", PYTHONHASHSEED="0")
    return own_code.environment(kept)


def snapshot(pid: int) -> dict[str, Any]:
    """The machine and one process at this moment, as far as /proc tells."""
    found: dict[str, Any] = {"load_average": list(os.getloadavg())}
    memory = _fields("/proc/meminfo", ("MemTotal", "MemAvailable", "SwapFree", "Dirty"))
    process = _fields(f"/proc/{pid}/status", ("State", "VmRSS", "VmSwap", "Threads", "nonvoluntary_ctxt_switches"))
    waits_in = _text(f"/proc/{pid}/wchan")
    found.update({name: value for name, value in (("memory", memory), ("process", process)) if value})
    if waits_in:
        found["waits_in"] = waits_in
    return found


def _fields(path: str, names: tuple[str, ...]) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
    return {name: printable(value.strip())[:80] for name, value in pairs if name in names}


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""
