"""`python -m benchmarks.transfer`: transfers against what a user would do instead, side by side, as Markdown.

    make bench-transfer SIZE=256M SCENARIOS=loopback,lan

Needs OpenSSH's server; rsync and rclone where they are to be measured; root for links other than loopback.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.transfer_bench import Bench
from benchmarks.transfer_run import Goal
from benchmarks.transfer_scenarios import SCENARIOS

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def size_of(text: str) -> int:
    """Bytes from `256M` and the like."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 256M or 2G") from None


def main() -> int:
    asked = _arguments()
    unknown = [name for name in asked.scenarios if name not in SCENARIOS]
    if unknown:
        sys.exit(f"there is no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whoever ends it gets no namespaces and servers left behind, even where a shell had SIGINT ignored.
        signal.signal(number, _leave)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="remote-eval-bench-", dir=_room(asked)) as folder:
        bench = Bench(
            Path(folder),
            asked.size,
            asked.far_size,
            asked.repeats,
            asked.rival_limit,
            lambda line: print(line, flush=True),
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(_machine(folder))
        for name in asked.scenarios:
            bench.tell(f"{time.monotonic() - began:.0f} s: {name}")
            SCENARIOS[name](bench)
    print("### Goals\n")
    print("\n".join(_goals(bench.goals)))
    print(f"\nMeasured in {(time.monotonic() - began) / 60:.0f} minutes, medians of {asked.repeats}.")
    return 0


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--size", type=size_of, default=size_of("512M"))
    parser.add_argument("--far-size", type=size_of, default=size_of("256M"), help="of the file sent over 60 ms")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scenarios", type=lambda text: text.split(","), default=list(SCENARIOS))
    parser.add_argument("--rival-limit", type=float, default=10.0, help="seconds after which a rival is stopped")
    parser.add_argument("--folder", type=Path, help="default: /dev/shm where it has room, so that no disk is measured")
    return parser.parse_args()


def _room(asked: argparse.Namespace) -> Path:
    if asked.folder is not None:
        return Path(asked.folder)
    memory = Path("/dev/shm")
    # Two files to send, and what arrives, beside its journal.
    if memory.is_dir() and shutil.disk_usage(memory).free > 6 * asked.size:
        return memory
    return Path(tempfile.gettempdir())


def _machine(folder: str) -> str:
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=30).stderr.split(",")[0].strip()
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()} {platform.machine()},"
        f" Python {platform.python_version()}, {ssh}; files in {folder.rsplit('/', 1)[0]}.\n"
    )


def _goals(goals: list[Goal]) -> list[str]:
    return ["| what | wanted | measured | |", "| --- | --- | --- | --- |", *(goal.row() for goal in goals)]


if __name__ == "__main__":
    sys.exit(main())
