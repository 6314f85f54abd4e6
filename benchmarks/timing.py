"""Paired timing of whole processes: A and B in turn, so that a machine whose speed drifts slows both."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import time
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Sample:
    """One process: wall seconds, and the largest resident set in bytes."""

    wall_s: float
    peak_rss_bytes: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """Runs of two commands, in the order in which they alternated."""

    ours: tuple[Sample, ...]
    theirs: tuple[Sample, ...]

    @property
    def ratio(self) -> float:
        """Median over pairs of theirs / ours: how many times faster ours is."""
        return statistics.median(b.wall_s / a.wall_s for a, b in zip(self.ours, self.theirs, strict=True))


def run_once(command: Sequence[str], timeout_s: float) -> Sample:
    """Run a command that must succeed, its output thrown away. Raises `RuntimeError` where it does not."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = began + timeout_s
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.002)
    process.returncode = os.waitstatus_to_exitcode(status)
    error = process.stderr.read() if process.stderr else b""
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}: {error.decode(errors='replace')[-2000:]}")
    return Sample(time.monotonic() - began, usage.ru_maxrss * 1024)


def pair(ours: Sequence[str], theirs: Sequence[str], *, runs: int = 7, timeout_s: float = 300.0) -> Pair:
    """Time both in turn, after one uncounted run of each."""
    for command in (ours, theirs):
        run_once(command, timeout_s)
    samples = [(run_once(ours, timeout_s), run_once(theirs, timeout_s)) for _ in range(runs)]
    return Pair(tuple(a for a, _ in samples), tuple(b for _, b in samples))


def row(name: str, measured: Pair) -> str:
    """A Markdown table row: medians, peak memory, ratio."""
    ours = statistics.median(s.wall_s for s in measured.ours)
    theirs = statistics.median(s.wall_s for s in measured.theirs)
    peak = max(s.peak_rss_bytes for s in measured.ours) / 1e6
    peak_theirs = max(s.peak_rss_bytes for s in measured.theirs) / 1e6
    return f"| {name} | {ours:.3f} | {theirs:.3f} | {measured.ratio:.2f} | {peak:.0f} | {peak_theirs:.0f} |"
