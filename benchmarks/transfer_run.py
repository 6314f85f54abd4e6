"""Runs of ours and of rivals, in turn, and what they come to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import transfer_ours
from benchmarks.transfer_ours import Outcome
from benchmarks.transfer_site import Site, descendants

OURS = "remote-eval"


@dataclasses.dataclass(frozen=True)
class OurRun:
    """`seconds` of the whole process, login, fingerprint and verification included. `sustained`: bytes/s over the
    second half of the file, as its progress tells; None where too little was seen of it."""

    seconds: float
    outcome: Outcome
    sustained: float | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """`run` sends once and returns bytes/s. `how`: cipher and congestion control."""

    name: str
    how: str
    run: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Figures:
    name: str
    how: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclasses.dataclass(frozen=True)
class Goal:
    """One line of what was to be reached. `reached` None: not measured here."""

    what: str
    wanted: str
    measured: str
    reached: bool | None

    def row(self) -> str:
        verdict = {True: "reached", False: "**missed**", None: "not measured"}[self.reached]
        return f"| {self.what} | {self.wanted} | {self.measured} | {verdict} |"


def run_ours(
    site: Site,
    file: Path,
    *,
    anew: bool = True,
    jobs: str = "health,reconstruct",
    limit_s: float = 900.0,
    on_moved: Callable[[int], None] | None = None,
) -> OurRun:
    """Send `file` by a process of its own; `anew`: nothing of it is on the node or remembered here.

    Raises `RuntimeError` where it fails, `subprocess.TimeoutExpired`.
    """
    if anew:
        site.clear()
    with _our_process(site, file, jobs) as process:
        watch = threading.Timer(limit_s, process.kill)
        watch.start()
        began = time.monotonic()
        last = ""
        seen: list[tuple[float, int]] = []
        for line in process.stdout or ():
            if line.startswith("moved "):
                seen.append((time.monotonic(), int(line.split()[1])))
                if on_moved is not None:
                    on_moved(int(line.split()[1]))
            else:
                last = line
        process.wait()
        watch.cancel()
        seconds = time.monotonic() - began
    if process.returncode != 0:
        raise RuntimeError(f"our transfer ended with {process.returncode}:\n{(site.folder / 'ours.log').read_text()}")
    return OurRun(seconds, Outcome(**json.loads(last)), _sustained(seen, file.stat().st_size))


def _sustained(seen: Sequence[tuple[float, int]], size: int) -> float | None:
    half = [(at, moved) for at, moved in seen if moved >= size // 2]
    if not half or half[-1][0] - half[0][0] < 0.2:
        return None
    return (half[-1][1] - half[0][1]) / (half[-1][0] - half[0][0])


def kill_ours_at(site: Site, file: Path, moved_bytes: int) -> int:
    """Send anew and SIGKILL our client once so much has moved; returns what it had counted as moved by then."""
    site.clear()
    reached = 0
    with _our_process(site, file, "health,reconstruct") as process:
        for line in process.stdout or ():
            if line.startswith("moved "):
                reached = int(line.split()[1])
                if reached >= moved_bytes:
                    process.kill()
                    break
        process.wait()
    if process.returncode == 0:
        raise RuntimeError("the transfer ended before it was killed")
    _await_no_sessions(site)
    return reached


@contextlib.contextmanager
def _our_process(site: Site, file: Path, jobs: str) -> Iterator[subprocess.Popen[str]]:
    # As an installed program does, it finds bytecode of itself: of the run before, which is not measured.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(site.folder / "bytecode")
    facts = site.folder / "site.json"
    facts.write_text(json.dumps(transfer_ours.describe(site)))
    command = [*site.link.near, sys.executable, "-m", "benchmarks.transfer_ours", str(facts), str(file), "--jobs", jobs]
    with (
        (site.folder / "ours.log").open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _await_no_sessions(site: Site, limit_s: float = 60.0) -> None:
    """The node's side of a killed client ends by itself once it sees that nobody is there."""
    deadline = time.monotonic() + limit_s
    while site.session_pids() and time.monotonic() < deadline:
        time.sleep(0.1)


def in_turn(contenders: Sequence[Contender], repeats: int, tell: Callable[[str], None]) -> list[Figures]:
    """Every contender once, then all again: a machine whose speed drifts slows all of them."""
    rates: dict[int, list[float]] = {index: [] for index in range(len(contenders))}
    for turn in range(repeats):
        for index, contender in enumerate(contenders):
            rate = contender.run()
            rates[index].append(rate)
            tell(f"  {turn + 1} of {repeats}: {contender.name}: {rate / 1e6:.1f} MB/s")
    return [Figures(c.name, c.how, tuple(rates[index])) for index, c in enumerate(contenders)]


def table(figures: Sequence[Figures], ours: Figures) -> list[str]:
    lines = [
        "| what | cipher, congestion control | MB/s, median | range | ours / this |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in figures:
        spread = f"{min(one.rates) / 1e6:.1f} to {max(one.rates) / 1e6:.1f}"
        ratio = "" if one is ours else f"{ours.median / one.median:.2f}"
        lines.append(f"| {one.name} | {one.how} | {one.median / 1e6:.1f} | {spread} | {ratio} |")
    return lines


@dataclasses.dataclass
class AgentPeak:
    """The largest resident set of one agent process, and what all of them read, as far as it was sampled."""

    peak_bytes: int = 0
    read_by_pid: dict[int, int] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def watching_agents(site: Site, interval_s: float = 0.1) -> Iterator[AgentPeak]:
    """Sample the agents below the site's server. It costs time, so not where a rate is measured."""
    seen, is_over = AgentPeak(), threading.Event()

    def watch() -> None:
        while not is_over.wait(interval_s):
            for pid in descendants(site.server.pid):
                with contextlib.suppress(OSError, ValueError):
                    _look_at(Path(f"/proc/{pid}"), pid, seen)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def _look_at(folder: Path, pid: int, seen: AgentPeak) -> None:
    words = (folder / "cmdline").read_bytes().split(b"\0")
    if b"agent" not in words or b"stream" not in words:
        return
    status = (folder / "status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    seen.peak_bytes = max(seen.peak_bytes, peak)
    counted = (folder / "io").read_text()
    seen.read_by_pid[pid] = int(counted.split("rchar:")[1].split()[0])
