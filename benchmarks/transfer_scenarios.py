"""What is measured: each scenario prints a table and adds to the list of goals."""

from __future__ import annotations

import filecmp
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import transfer_files as files
from benchmarks import transfer_rivals as rivals
from benchmarks.transfer_bench import MIB, Bench, mib
from benchmarks.transfer_link import LOOPBACK
from benchmarks.transfer_rates import emulator, far, lan, loopback
from benchmarks.transfer_run import kill_ours_at, run_ours, watching_agents
from benchmarks.transfer_site import Site


def resume(bench: Bench) -> None:
    """Cut at half: the connections alone, and the client by SIGKILL."""
    bench.say(f"### Cut at half, loopback, {mib(bench.size)}\n")
    with bench.file("random") as file, bench.site(LOOPBACK) as site:
        files.write_random(file, bench.size)
        run_ours(site, file)
        size, cuts = bench.size, list[int]()
        usual = run_ours(site, file).outcome.read_bytes

        def cut_once(moved: int) -> None:
            if moved >= size // 2 and not cuts:
                cuts.append(moved)
                site.cut()

        with watching_agents(site, 0.02) as agents:
            done = run_ours(site, file, on_moved=cut_once)
        again = done.outcome.bytes_sent - size
        read_again = max(0, done.outcome.read_bytes - usual - again)
        there = max(0, sum(agents.read_by_pid.values()) - done.outcome.bytes_sent)
        bench.say("| what | sent again | read again here, at most | read again there, sampled |")
        bench.say("| --- | --- | --- | --- |")
        bench.say(
            f"| all connections cut at {mib(cuts[0])} | {again / 1e6:.1f} MB"
            f" | {read_again / 1e6:.1f} MB | {there / 1e6:.1f} MB |"
        )
        moved = kill_ours_at(site, file, size // 2)
        done = run_ours(site, file, anew=False)
        lost = moved - (size - done.outcome.bytes_sent)
        bench.say(f"| client killed at {mib(moved)} | {lost / 1e6:.1f} MB | | |\n")
    bench.goal("cut at half, sent again", "16 MB", f"{again / 1e6:.1f} MB", again <= 16e6)
    bench.goal("cut at half, read again here", "0", f"{read_again / 1e6:.1f} MB", read_again < 16e6)


def cuts(bench: Bench) -> None:
    """Every connection cut ten times on the way. `--scenarios cuts --size 21G --folder /var/tmp` is the real thing."""
    bench.say(f"### Cut ten times, loopback, {mib(bench.size)}\n")
    with bench.file("random") as file, bench.site(LOOPBACK) as site:
        files.write_random(file, bench.size)
        run_ours(site, files.write_random(bench.folder / "small", MIB))
        made: list[int] = []

        def cut(moved: int) -> None:
            if len(made) < 10 and moved > (len(made) + 1) * bench.size / 11:
                made.append(moved)
                site.cut()

        with watching_agents(site) as agents:
            done = run_ours(site, file, on_moved=cut, limit_s=3600)
        stored = list((site.node_root / "checkpoints").glob("*/file"))
        is_whole = any(filecmp.cmp(file, path, shallow=False) for path in stored)
    again = done.outcome.bytes_sent - bench.size
    bench.say("| cuts | seconds | sent again | byte for byte the same | client | agent |")
    bench.say("| --- | --- | --- | --- | --- | --- |")
    bench.say(
        f"| {len(made)} | {done.seconds:.0f} | {again / 1e6:.1f} MB, {again / 1e6 / max(1, len(made)):.1f} a cut"
        f" | {'yes' if is_whole else '**no**'}"
        f" | {done.outcome.peak_bytes / 1e6:.0f} MB | {agents.peak_bytes / 1e6:.0f} MB |\n"
    )
    bench.goal("ten cuts, arrives verified", "yes", "yes" if is_whole else "no", is_whole)


def unchanged(bench: Bench) -> None:
    """A file that the node has: as it was, with another time stamp, with one layer changed."""
    bench.say(f"### Sent before, loopback, bf16 checkpoint of {mib(bench.size)}\n")
    with bench.file("a.pt") as file, bench.file("b.pt") as changed, bench.site(LOOPBACK) as site:
        files.write_checkpoint(file, bench.size, "bfloat16")
        delta = files.change_one_layer(file, changed)
        size = file.stat().st_size
        ours: dict[str, list[float]] = {name: [] for name in ("as it was", "touched", "one layer changed")}
        theirs: dict[str, list[float]] = {name: [] for name in ours}
        sent = 0
        for _ in range(bench.repeats):
            run_ours(site, file)
            os.utime(file, ns=(time.time_ns(), time.time_ns() - 10**10))
            # A file that changed just now is not remembered: the first look is the one that counts.
            time.sleep(2.5)
            run_ours(site, file, anew=False)
            ours["as it was"].append(run_ours(site, file, anew=False).seconds)
            os.utime(file, ns=(time.time_ns(), time.time_ns() - 2 * 10**10))
            ours["touched"].append(run_ours(site, file, anew=False).seconds)
            run = run_ours(site, changed, anew=False)
            ours["one layer changed"].append(run.seconds)
            sent = max(sent, run.outcome.bytes_sent)
            if rivals.is_installed(rivals.RSYNC):
                _rsync_again(site, file, changed, theirs)
        bench.say("| what | ours, s, median | rsync -t, s | rsync / ours |\n| --- | --- | --- | --- |")
        for name, seconds in ours.items():
            rsync = _median(theirs[name])
            ratio = f"{rsync / _median(seconds):.1f}" if rsync else ""
            bench.say(f"| {name} | {_median(seconds):.2f} | {f'{rsync:.2f}' if rsync else ''} | {ratio} |")
        bench.say(f"\nOne layer is {delta / 1e6:.1f} MB; {sent / 1e6:.1f} MB were sent.\n")
    bench.goal(
        "unchanged",
        "2 s at 20 GB",
        f"{_median(ours['as it was']):.2f} s at {mib(size)}",
        _median(ours["as it was"]) <= 2,
    )
    bench.goal("one layer changed, bytes", "1.01 ×", f"{sent / delta:.2f} ×", sent <= 1.01 * delta)
    rsync = _median(theirs["one layer changed"])
    if rsync:
        faster = rsync / _median(ours["one layer changed"])
        bench.goal("one layer changed, against rsync", "8 ×", f"{faster:.1f} ×", faster >= 8)


def weights(bench: Bench) -> None:
    """`reconstruct` alone needs the weights and no optimizer."""
    bench.say(f"### Weights alone, bf16 with Adam's moments, {mib(bench.size)}\n")
    with bench.file("adam.pt") as file, bench.site(LOOPBACK) as site:
        files.write_checkpoint(file, bench.size, "bfloat16", adam=True)
        size = file.stat().st_size
        first = run_ours(site, file, jobs="reconstruct").outcome.bytes_sent
        rest = run_ours(site, file, anew=False, jobs="health,reconstruct").outcome.bytes_sent
    bench.say(
        f"For `reconstruct` {first / 1e6:.0f} MB of {size / 1e6:.0f}; for `health` after that {rest / 1e6:.0f} MB.\n"
    )
    bench.goal("weights alone", "1/3 of the bytes", f"{first / size:.2f}", first <= 0.36 * size)


def memory(bench: Bench) -> None:
    """Largest resident sets, over a whole transfer."""
    bench.say(f"### Memory, loopback, {mib(bench.size)}\n")
    with bench.file("random") as file, bench.site(LOOPBACK) as site:
        files.write_random(file, bench.size)
        with watching_agents(site) as agents:
            done = run_ours(site, file).outcome
    bench.say("| client | agent | streams |\n| --- | --- | --- |")
    cells = [f"{value / 1e6:.0f} MB" for value in (done.peak_bytes, agents.peak_bytes)]
    bench.say(f"| {' | '.join(cells)} | {done.most_streams} |\n")
    bench.goal("memory of the client", "200 MB", cells[0], done.peak_bytes < 200e6)
    bench.goal("memory of the agent", "100 MB", cells[1], agents.peak_bytes < 100e6)


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "loopback": loopback,
    "lan": lan,
    "far": functools.partial(far, loss=0.0, goals={"cubic": 3.0}),
    "lossy": functools.partial(far, loss=0.001, goals={"cubic": 40.0, "bbr": 2.5}),
    "very-lossy": functools.partial(far, loss=0.01, goals={"cubic": 100.0, "bbr": 2.5}),
    "emulator": emulator,
    "resume": resume,
    "cuts": cuts,
    "unchanged": unchanged,
    "weights": weights,
    "memory": memory,
}


def _rsync_again(site: Site, file: Path, changed: Path, seconds: dict[str, list[float]]) -> None:
    """The same three steps by rsync, on its own copy at the target."""

    def run(source: Path) -> float:
        return rivals.run_watched([*site.link.near, *rivals.rsync_command(site, source)], 900, site.target).seconds

    site.clear()
    run(file)
    seconds["as it was"].append(run(file))
    os.utime(file, ns=(time.time_ns(), time.time_ns() - 3 * 10**10))
    seconds["touched"].append(run(file))
    seconds["one layer changed"].append(run(changed))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
