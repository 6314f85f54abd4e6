"""How fast: each scenario sends over a link what a user would send, by us and by what a user would take instead."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import transfer_files as files
from benchmarks import transfer_rivals as rivals
from benchmarks.transfer_bench import Bench, mib
from benchmarks.transfer_link import LOOPBACK, Link, LinkShape, congestion_controls, open_link, raw_tcp_rate
from benchmarks.transfer_rivals import Rival
from benchmarks.transfer_run import OURS, Contender, Figures, in_turn, run_ours, table
from benchmarks.transfer_site import GCM, Site
from benchmarks.warm_memory import warm_memory

LAN = LinkShape("1 Gbit/s LAN (veth, tbf)", 1000)


def loopback(bench: Bench) -> None:
    """CPU-bound: everything verified, nothing on a disk that is slower than SSH."""
    bench.say(f"### Loopback, {os.cpu_count()} cores, {mib(bench.size)} of random data\n")
    with bench.file("random") as file, bench.site(LOOPBACK) as site:
        files.write_random(file, bench.size)
        run_ours(site, file)  # installs the payload, once for a node
        cipher = rivals.paramiko_cipher(site)
        chosen = [rivals.SSH_CAT, rivals.SCP, rivals.SCP_VERIFIED, rivals.RSYNC, rivals.RCLONE]
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
    verified = by_name.get(rivals.SCP_VERIFIED.name)
    bench.ratio_goal("loopback, against scp that is verified as ours is", ours, verified, 1.2)


def lan(bench: Bench) -> None:
    """A link of 1 Gbit/s, and what packing makes of weights on it."""
    if bench.skip(LAN):
        return
    bench.say(f"### {LAN.name}, {mib(bench.size)}\n")
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
    bench.say(f"### {shape.name}, {loss:.1%} loss, {mib(bench.far_size)} of random data\n")
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


def _say_table(bench: Bench, figures: list[Figures], ours: Figures) -> None:
    for line in table(figures, ours):
        bench.say(line)
    bench.say("")
