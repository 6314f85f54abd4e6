"""Reads a checkpoint again and again with one of its files changed, and reports anything but a reading or its error.

Run as a program: `python read_worker.py ROOT TARGET FILE < mutations.json`. It takes memory and CPU limits upon itself,
and ends at once, with status 3, if anything is imported, executed, started, or opened outside the target's folder.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

MEMORY_BYTES = 900 * 1024 * 1024
CPU_S = 100
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "compile")


def guard(folder: str) -> None:
    """From here on only files below `folder` may be opened, and nothing may be imported or started."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_outside = False
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            is_outside = os.path.commonpath((folder, path)) != folder
        if is_outside or event.startswith(_FORBIDDEN) or event in ("import", "exec"):
            os.write(2, f"forbidden: {event} {arguments!r}"[:2000].encode(errors="replace"))
            os._exit(3)

    sys.addaudithook(watch)


def mutated(data: bytes, mutation: list[Any]) -> bytes:
    """`["flip", offset, mask]`, `["cut", length]` or `["write", offset, hex]`."""
    kind, at = mutation[0], mutation[1]
    if kind == "cut":
        return data[:at]
    new = bytes([data[at] ^ mutation[2]]) if kind == "flip" else bytes.fromhex(mutation[2])
    return data[:at] + new + data[at + len(new) :]


def main(target: str, file: str) -> None:
    from remote_payload.checkpoint import CheckpointError, header_findings, read_header
    from remote_payload.checkpoint.render import render_header
    from remote_payload.checkpoint.tensor_bytes import iter_tensor_bytes

    mutations = json.load(sys.stdin)
    whole = Path(file).read_bytes()

    def read_all() -> str:
        try:
            header = read_header(target)
        except CheckpointError as error:
            return error.kind
        findings = header_findings(header)
        json.dumps(header.to_json(), allow_nan=False)
        render_header(header, findings)
        for tensor in header.tensors[:300]:
            with contextlib.suppress(CheckpointError):
                for _ in iter_tensor_bytes(header, tensor.name):
                    pass
        return "read" if not findings else ",".join(sorted({f.id for f in findings}))

    # Once before the guard, so that everything that reading needs is imported: text codecs come at their first use.
    codecs.lookup("raw-unicode-escape")
    outcomes = Counter({f"whole: {read_all()}": 1})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    guard(str(Path(target).resolve().parent))
    for mutation in mutations:
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, mutated(whole, mutation))
        os.close(descriptor)
        outcomes[read_all()] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main(sys.argv[2], sys.argv[3])
