"""What is measured: each scenario prints a table and adds to the list of goals."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks import transfer_files as files
from benchmarks import transfer_rivals as rivals
from benchmarks.transfer_link import (
    LOOPBACK,
    Link,
    LinkShape,
    congestion_controls,
    open_link,
    raw_tcp_rate,
    why_not,
)
from benchmarks.transfer_rivals import Rival
from benchmarks.transfer_run import (
    OURS,
    Contender,
    Figures,
    Goal,
    in_turn,
    kill_ours_at,
    run_ours,
    table,
    watching_agents,
)
from benchmarks.transfer_site import GCM, Site, open_site
from benchmarks.warm_memory import warm_memory

MIB = 1024 * 1024
LAN = LinkShape("1 Gbit/s LAN (veth, tbf)", 1000)


@dataclasses.dataclass
class Bench:
    """What a scenario needs. `say` prints a line of the report, `tell` one about the progress."""

    folder: Path
    size: int
    far_size: int
    repeats: int
    rival_limit_s: float
    say: Callable[[str], None]
    tell: Callable[[str], None]
    goals: list[Goal] = dataclasses.field(default_factory=list)
    _serial: int = 0

    @contextlib.contextmanager
    def site(self, shape: LinkShape) -> Iterator[Site]:
        """A fresh site over a link of this shape; its folder goes when it is closed."""
        self._serial += 1
        folder = self.folder / f"s{self._serial}"
        try:
            with open_link(shape, self.folder) as link, open_site(folder, link) as site:
                yield site
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def skip(self, shape: LinkShape) -> bool:
        reason = why_not(shape)
        if reason is not None:
            self.say(f"Not measured here: {shape.name} {reason}.")
        return reason is not None

    def goal(self, what: str, wanted: str, measured: str, reached: bool | None) -> None:
        self.goals.append(Goal(what, wanted, measured, reached))

    def ratio_goal(self, what: str, ours: Figures, theirs: Figures | None, wanted: float) -> None:
        if theirs is None:
            self.goal(what, f"{wanted:g} ×", "", None)
            return
        ratio = ours.median / theirs.median
        self.goal(what, f"{wanted:g} ×", f"{ratio:.2f} ×", ratio >= wanted)


def loopback(bench: Bench) -> None:
    """CPU-bound: everything verified, nothing on a disk that is slower than SSH."""
    bench.say(f"### Loopback, {os.cpu_count()} cores, {_mib(bench.size)} of random data\n")
    with bench.file("random") as file, bench.site(LOOPBACK) as site:
        files.write_random(file, bench.size)
        run_ours(site, file)  # installs the payload, once for a node
        cipher = rivals.paramiko_cipher(site)
        chosen = [rivals.SSH_CAT, rivals.SCP, rivals.RSYNC, rivals.RCLONE]
        sustained: list[float] = []
        contenders = [
            _ours(site, file, sustained=sustained),
            *(_rival(bench, site, r, file) for r in _installed(bench, chosen)),
        ]
        for slow in (rivals.PARAMIKO, rivals.FABRIC):
            contenders.append(_rival(bench, site, slow, file, cipher))
        figures = in_turn([_warmed(bench, site, one) for one in contenders], bench.repeats, bench.tell)
    ours, by_name = figures[0], {one.name: one for one in figures}
    _say_table(bench, _with_sustained(figures, sustained), ours)
    bench.goal("loopback, verified", "300 MB/s", f"{ours.median / 1e6:.0f} MB/s", ours.median >= 300e6)
    for name, wanted in (("rsync", 1.5), ("rclone sftp", 1.5), ("scp", 1.2), ("Fabric put", 4.0)):
        bench.ratio_goal(f"loopback, against {name}", ours, by_name.get(name), wanted)


def lan(bench: Bench) -> None:
    """A link of 1 Gbit/s, and what packing makes of weights on it."""
    if bench.skip(LAN):
        return
    bench.say(f"### {LAN.name}, {_mib(bench.size)}\n")
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(bench.site(LAN))
        random, bf16, fp32 = (stack.enter_context(bench.file(name)) for name in ("random", "bf16.pt", "fp32.pt"))
        files.write_random(random, bench.size)
        files.write_checkpoint(bf16, bench.size, "bfloat16")
        files.write_checkpoint(fp32, bench.size, "float32")
        run_ours(site, random)
        seconds = min(bench.size / 115e6, 15.0)  # its rate does not change
        sustained: list[float] = []
        contenders = [
            Contender("raw TCP, one connection", "none, cubic", lambda: raw_tcp_rate(site.link, seconds, "cubic")),
            _ours(site, random, "random", sustained=sustained),
            _ours(site, bf16, "bf16 weights"),
            _ours(site, fp32, "fp32 weights"),
            *(_rival(bench, site, r, random) for r in _installed(bench, [rivals.SCP, rivals.RSYNC, rivals.RCLONE])),
        ]
        figures = in_turn(contenders, bench.repeats, bench.tell)
    raw, ours, packed16, packed32 = figures[:4]
    scp = next((one for one in figures if one.name == "scp"), None)
    steady = Figures(f"{OURS}, random, second half alone", ours.how, tuple(sustained))
    _say_table(bench, [*figures[:2], *([steady] if sustained else []), *figures[2:]], ours)
    share = ours.median / raw.median
    bench.goal("LAN, random data, of raw TCP", "97 %", f"{share:.1%}", share >= 0.97)
    if sustained:
        share = steady.median / raw.median
        bench.goal("LAN, random data once it is sent, of raw TCP", "97 %", f"{share:.1%}", share >= 0.97)
    bench.ratio_goal("LAN, bf16 weights, against scp", packed16, scp, 1.4)
    bench.ratio_goal("LAN, fp32 weights, against scp", packed32, scp, 1.15)


def far(bench: Bench, loss: float, goals: Mapping[str, float]) -> None:
    """60 ms away; rivals that would take for ever are stopped, and their rate is taken. `goals`: against scp with which
    congestion control."""
    shape = LinkShape("1 Gbit/s, 60 ms (emulated)", 1000, 60.0, loss, emulated=True, queue_ms=50.0)
    if bench.skip(shape):
        return
    kinds = [name for name in ("cubic", "bbr") if name in congestion_controls()]
    bench.say(f"### {shape.name}, {loss:.1%} loss, {_mib(bench.far_size)} of random data\n")
    with bench.site(shape) as site, bench.file("random") as file:
        files.write_random(file, bench.far_size)
        run_ours(site, file)
        sustained: list[float] = []
        contenders = [_ours(site, file, sustained=sustained)]
        for kind in kinds:
            contenders.append(Contender("raw TCP, one connection", f"none, {kind}", _raw(site.link, kind)))
            contenders += [_rival(bench, site, r, file, kind=kind) for r in _installed(bench, [rivals.SCP])]
        if not loss:
            contenders += [_rival(bench, site, r, file) for r in _installed(bench, [rivals.RSYNC, rivals.RCLONE])]
        figures = in_turn(contenders, bench.repeats, bench.tell)
    _say_table(bench, _with_sustained(figures, sustained), figures[0])
    for congestion, ratio in goals.items():
        theirs = next((one for one in figures if one.name == "scp" and one.how.endswith(congestion)), None)
        bench.ratio_goal(f"60 ms, {loss:.1%} loss, against scp with {congestion}", figures[0], theirs, ratio)


def emulator(bench: Bench) -> None:
    """What the emulator itself costs: raw TCP through it with no delay and no limit that matters, and without it."""
    shapes = [
        LinkShape("the emulator, no delay, no loss", 40_000, emulated=True),
        LinkShape("the emulator, 1 Gbit/s", 1000, emulated=True),
        LAN,
    ]
    if any(bench.skip(shape) for shape in shapes):
        return
    bench.say("### What the emulator costs\n\n| raw TCP over | MB/s, median of 3 |\n| --- | --- |")
    rates = {"loopback": sorted(raw_tcp_rate(Link(LOOPBACK), 2.0, "cubic") for _ in range(3))[1]}
    for shape in shapes:
        with open_link(shape, bench.folder) as link:
            rates[shape.name] = sorted(raw_tcp_rate(link, 2.0, "cubic") for _ in range(3))[1]
    for name, rate in rates.items():
        bench.say(f"| {name} | {rate / 1e6:.0f} |")
    bench.say("")


def resume(bench: Bench) -> None:
    """Cut at half: the connections alone, and the client by SIGKILL."""
    bench.say(f"### Cut at half, loopback, {_mib(bench.size)}\n")
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
            f"| all connections cut at {_mib(cuts[0])} | {again / 1e6:.1f} MB"
            f" | {read_again / 1e6:.1f} MB | {there / 1e6:.1f} MB |"
        )
        moved = kill_ours_at(site, file, size // 2)
        done = run_ours(site, file, anew=False)
        lost = moved - (size - done.outcome.bytes_sent)
        bench.say(f"| client killed at {_mib(moved)} | {lost / 1e6:.1f} MB | | |\n")
    bench.goal("cut at half, sent again", "16 MB", f"{again / 1e6:.1f} MB", again <= 16e6)
    bench.goal("cut at half, read again here", "0", f"{read_again / 1e6:.1f} MB", read_again < 16e6)


def cuts(bench: Bench) -> None:
    """Every connection cut ten times on the way. `--scenarios cuts --size 21G --folder /var/tmp` is the real thing."""
    bench.say(f"### Cut ten times, loopback, {_mib(bench.size)}\n")
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
    bench.say(f"### Sent before, loopback, bf16 checkpoint of {_mib(bench.size)}\n")
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
        f"{_median(ours['as it was']):.2f} s at {_mib(size)}",
        _median(ours["as it was"]) <= 2,
    )
    bench.goal("one layer changed, bytes", "1.01 ×", f"{sent / delta:.2f} ×", sent <= 1.01 * delta)
    rsync = _median(theirs["one layer changed"])
    if rsync:
        faster = rsync / _median(ours["one layer changed"])
        bench.goal("one layer changed, against rsync", "8 ×", f"{faster:.1f} ×", faster >= 8)


def weights(bench: Bench) -> None:
    """`reconstruct` alone needs the weights and no optimizer."""
    bench.say(f"### Weights alone, bf16 with Adam's moments, {_mib(bench.size)}\n")
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
    bench.say(f"### Memory, loopback, {_mib(bench.size)}\n")
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


def _ours(site: Site, file: Path, what: str = "", sustained: list[float] | None = None) -> Contender:
    """`sustained` takes in the rates over the second half of the file."""
    size = file.stat().st_size
    name = f"{OURS}, {what}" if what else OURS

    def run() -> float:
        done = run_ours(site, file)
        if sustained is not None and done.sustained is not None:
            sustained.append(done.sustained)
        return size / done.seconds

    return Contender(name, f"{GCM}, its own choice", run)


def _with_sustained(figures: list[Figures], sustained: list[float]) -> list[Figures]:
    """Ours again, by the second half of the file alone: what a longer transfer comes to, without login and start."""
    if not sustained:
        return figures
    return [figures[0], Figures(f"{OURS}, second half alone", figures[0].how, tuple(sustained)), *figures[1:]]


def _rival(
    bench: Bench, site: Site, rival: Rival, file: Path, cipher: str | None = None, kind: str | None = None
) -> Contender:
    def run() -> float:
        if kind is not None:
            site.link.set_congestion_control(kind)
        try:
            return rivals.run_rival(rival, site, file, bench.rival_limit_s).rate
        finally:
            if kind is not None:
                site.link.set_congestion_control("cubic")

    return Contender(rival.name, f"{cipher or rival.cipher}, {kind or site.link.congestion_control()}", run)


def _warmed(bench: Bench, site: Site, contender: Contender) -> Contender:
    """As `contender`, with nothing left by another one, and memory for what it writes."""

    def run() -> float:
        site.clear()
        with warm_memory(bench.folder, bench.size):
            return contender.run()

    return dataclasses.replace(contender, run=run)


def _raw(link: Link, kind: str) -> Callable[[], float]:
    return lambda: raw_tcp_rate(link, 3.0, kind)


def _installed(bench: Bench, asked: list[Rival]) -> list[Rival]:
    for rival in asked:
        if not rivals.is_installed(rival):
            bench.say(f"Not measured here: {rival.name} is not installed.\n")
    return [rival for rival in asked if rivals.is_installed(rival)]


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


def _say_table(bench: Bench, figures: list[Figures], ours: Figures) -> None:
    for line in table(figures, ours):
        bench.say(line)
    bench.say("")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
