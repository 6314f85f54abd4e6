"""Links to measure over: loopback; two network namespaces joined by veth and `tbf`, or by our link emulator.

Only namespaces, devices and processes made here are touched, and they go when the link is closed. All but loopback
need root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_EMULATOR_SOURCE = Path(__file__).with_name("link_emulator.c")
_LIMIT_S = 30.0


@dataclasses.dataclass(frozen=True)
class LinkShape:
    """`mbit_per_s` None: loopback. `loss` on the way to the node only. `emulated`: by `link_emulator.c`, which alone
    can delay and lose; else by the kernel's `tbf`."""

    name: str
    mbit_per_s: float | None = None
    round_trip_ms: float = 0.0
    loss: float = 0.0
    emulated: bool = False
    queue_ms: float = 20.0


LOOPBACK = LinkShape("loopback")


@dataclasses.dataclass(frozen=True)
class Link:
    """Where the two ends are. `near` and `far` are words to put in front of a command to run it at that end, `route`
    the one from near to far."""

    shape: LinkShape
    address: str = "127.0.0.1"
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    route: tuple[str, ...] = ()

    def congestion_control(self) -> str:
        """What a socket at the near end gets that asks for nothing."""
        return "cubic" if self.near else Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()

    def set_congestion_control(self, name: str) -> None:
        """For every new connection from the near end. Only where the near end is a namespace of ours.

        By the route: a namespace's own default may not be what the kernel restricts to privileged users.
        """
        if self.near:
            _run(["ip", "-n", self.near[-1], "route", "replace", *self.route, "congctl", name])


def congestion_controls() -> list[str]:
    """What this kernel has."""
    return Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()


def why_not(shape: LinkShape) -> str | None:
    """Why this machine cannot have such a link; None where it can."""
    if shape.mbit_per_s is None:
        return None
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("ip", "tc", *(("cc",) if shape.emulated else ())) if shutil.which(name) is None]
    if missing:
        return f"needs the program {missing[0]}"
    if shape.emulated and not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    return None


@contextlib.contextmanager
def open_link(shape: LinkShape, folder: Path) -> Iterator[Link]:
    """Make the link. Raises `subprocess.CalledProcessError` where the kernel refuses."""
    if shape.mbit_per_s is None:
        yield LOOPBACK_LINK
        return
    token = secrets.token_hex(3)
    near, far = f"re-near-{token}", f"re-far-{token}"
    with contextlib.ExitStack() as undo:
        for name in (near, far):
            _run(["ip", "netns", "add", name])
            undo.callback(_run, ["ip", "netns", "del", name])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
        if shape.emulated:
            undo.enter_context(_emulator(shape, near, far, folder))
            device = {near: "emu0", far: "emu0"}
        else:
            device = _veth(shape, near, far, token)
        _run(["ip", "-n", near, "addr", "add", "198.18.0.1", "peer", "198.18.0.2", "dev", device[near]])
        _run(["ip", "-n", far, "addr", "add", "198.18.0.2", "peer", "198.18.0.1", "dev", device[far]])
        for name in (near, far):
            _run(["ip", "-n", name, "link", "set", device[name], "up"])
        enter = ("ip", "netns", "exec")
        route = ("198.18.0.2", "dev", device[near], "src", "198.18.0.1")
        link = Link(shape, "198.18.0.2", (*enter, near), (*enter, far), route)
        link.set_congestion_control("cubic")
        yield link


LOOPBACK_LINK = Link(LOOPBACK)


def _veth(shape: LinkShape, near: str, far: str, token: str) -> dict[str, str]:
    device = {near: f"re{token}a", far: f"re{token}b"}
    _run(["ip", "link", "add", device[near], "netns", near, "type", "veth", "peer", "name", device[far], "netns", far])
    for name in (near, far):
        shaping = ["rate", f"{shape.mbit_per_s}mbit", "burst", "256k", "latency", f"{shape.queue_ms}ms"]
        _run(["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device[name], "root", "tbf", *shaping])
    return device


@contextlib.contextmanager
def _emulator(shape: LinkShape, near: str, far: str, folder: Path) -> Iterator[None]:
    binary = folder / "link_emulator"
    _run(["cc", "-O2", "-pthread", "-o", str(binary), str(_EMULATOR_SOURCE)])
    one_way_us = int(shape.round_trip_ms * 500)
    words = [str(binary), near, far, str(shape.mbit_per_s), str(one_way_us), str(shape.loss), str(shape.queue_ms)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise RuntimeError("the link emulator does not start")
        yield
    finally:
        process.kill()
        process.wait()


def raw_tcp_rate(link: Link, seconds: float, congestion_control: str) -> float:
    """Bytes/s that one bare TCP connection carries to the far end: what a file transfer could reach at most."""
    here = [sys.executable, "-c"]
    receiver = subprocess.Popen([*link.far, *here, _RECEIVER, link.address], stdout=subprocess.PIPE, text=True)
    try:
        if receiver.stdout is None:
            raise RuntimeError("the receiver has no output")
        port = receiver.stdout.readline().strip()
        _run([*link.near, *here, _SENDER, link.address, port, str(seconds), congestion_control], seconds + _LIMIT_S)
        counted, lasted = receiver.stdout.readline().split()
        receiver.wait(_LIMIT_S)
    finally:
        receiver.kill()
        receiver.wait()
    return int(counted) / float(lasted)


_RECEIVER = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
listener.settimeout(30)
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
buffer, count, began = bytearray(1 << 20), 0, time.monotonic()
while got := connection.recv_into(buffer):
    count += got
print(count, time.monotonic() - began, flush=True)
"""
_SENDER = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, sys.argv[4].encode())
data, until = bytes(1 << 20), time.monotonic() + float(sys.argv[3])
while time.monotonic() < until:
    connection.sendall(data)
"""


def _run(command: list[str], limit_s: float = _LIMIT_S) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL
    )
    return done.stdout
