"""`python -m benchmarks.transfer_loopback`: how fast a machine with many cores sends to itself, verified.

Against one `ssh cat` and several side by side. Makes its keys, starts its own sshd, and writes a file of random bytes
in memory. The data is sent by `upload_file` from a remembered manifest, as a checkpoint is whose digest is known:
hashing on this side is told apart. Needs of Python only what the client needs, of the machine only OpenSSH.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.transfer import size_of
from benchmarks.transfer_link import LOOPBACK_LINK
from benchmarks.transfer_ours import describe
from benchmarks.transfer_site import GCM, Site, open_site
from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.pipeline.world import make_services
from orchestrator.profiles import ClusterProfile
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.chunks import ChunkManifest

_LIMIT_S = 300.0


def main() -> int:
    asked = _arguments()
    with tempfile.TemporaryDirectory(prefix="remote-eval-loop-", dir=asked.folder) as name:
        folder = Path(name)
        source = folder / "file"
        _write_varied(source, asked.size)
        with open_site(folder / "site", LOOPBACK_LINK) as site:
            report = _measure(site, source, asked)
    print(json.dumps(report, indent=1))
    return 0


def _measure(site: Site, source: Path, asked: argparse.Namespace) -> dict[str, object]:
    report: dict[str, object] = {"cores": os.cpu_count(), "bytes": asked.size, "cipher": GCM}
    layout = LocalLayout(site.home / "data", site.home / "config", site.home / "cache")
    began = time.monotonic()
    manifest = digest_local_file(source, layout).manifest
    report["fingerprint_gb_per_s"] = _gb(asked.size, time.monotonic() - began)
    profile = ClusterProfile.model_validate({**describe(site)["profile"], "transport": "openssh"})
    services = make_services(layout, _Silent(), lambda *_: None)
    with services.open_node(profile, build_payload(layout)) as node:
        _ = node.hello
        for count in asked.streams:
            policy = StreamPolicy(fixed=count) if count else StreamPolicy()
            rates, used = [], 0
            for _ in range(asked.repeats):
                site.clear()
                seconds, used = _send(node, source, manifest, policy)
                rates.append(_gb(asked.size, seconds))
            _say(report, f"ours, {f'{count} streams' if count else f'its own choice ({used} streams)'}", rates)
    for count in (1, asked.rivals):
        rates = []
        for _ in range(asked.repeats):
            rates.append(_gb(asked.size * count, _ssh_cats(site, source, count)))
        _say(report, f"ssh cat, {count} at once, not verified", rates)
    return report


def _send(node: Node, source: Path, manifest: ChunkManifest, policy: StreamPolicy) -> tuple[float, int]:
    most = 0

    def watch(progress: object) -> None:
        nonlocal most
        most = max(most, getattr(progress, "streams", 0))

    began = time.monotonic()
    result = upload_file(node, source, manifest, streams=policy, on_progress=watch)
    seconds = time.monotonic() - began
    if Path(result.path_on_node).stat().st_size != manifest.size:
        raise RuntimeError("what arrived has another size")
    return seconds, most


def _ssh_cats(site: Site, source: Path, count: int) -> float:
    """All of the file over each of `count` connections, thrown away at the far end so that memory does not decide."""
    command = shlex.join(["ssh", *site.ssh_options(), "-p", str(site.port), site.login, "cat > /dev/null"])
    words = ["sh", "-c", f"exec {command} < {shlex.quote(str(source))}"]
    began = time.monotonic()
    running = [subprocess.Popen(words, stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        for process in running:
            if process.wait(_LIMIT_S) != 0:
                raise RuntimeError("ssh cat failed")
        return time.monotonic() - began
    finally:
        for process in running:
            process.kill()
            process.wait()


def _write_varied(path: Path, size: int) -> None:
    """Blocks that differ from each other, quickly: neither ssh nor the store can make anything of them."""
    block = bytearray(os.urandom(32 * 1024 * 1024))
    with path.open("wb") as file:
        for number in range((size + len(block) - 1) // len(block)):
            for at in range(0, len(block), 4096):
                block[at : at + 8] = number.to_bytes(8, "big")
            file.write(memoryview(block)[: min(len(block), size - file.tell())])


def _say(report: dict[str, object], what: str, rates: list[float]) -> None:
    report[what] = {"median": round(statistics.median(rates), 3), "all": [round(rate, 3) for rate in rates]}
    print(f"{what}: {', '.join(f'{rate:.2f}' for rate in rates)} GB/s", file=sys.stderr, flush=True)


def _gb(size: int, seconds: float) -> float:
    return size / seconds / 1e9


@dataclasses.dataclass(frozen=True)
class _Silent:
    """A `Reporter` for nobody."""

    def stage(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def finding(self, finding: object) -> None: ...

    def retry(self, notice: object) -> None: ...

    def transfer(self, what: str, progress: object) -> None: ...

    def attempt(self, status: object) -> None: ...


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_loopback", description=__doc__)
    parser.add_argument("--size", type=size_of, default=size_of("8G"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rivals", type=int, default=8, help="ssh cats side by side")
    parser.add_argument(
        "--streams",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[8, 12, 16],
        help="fixed numbers to try; 0: its own choice",
    )
    parser.add_argument("--folder", type=Path, default=_roomy(), help="in memory, with room for the file twice")
    return parser.parse_args()


def _roomy() -> Path:
    """/dev/shm, unless it is the small one of a container."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 20 * 2**30:
        return memory
    return Path(tempfile.gettempdir())


if __name__ == "__main__":
    sys.exit(main())
