"""What a node's store has made durable of files that are on their way to it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from remote_payload.wire.chunks import ChunkManifest, digest_file
from remote_payload.wire.layout import NodeLayout

_LINE = re.compile(rb"(?m)^(\d+) [0-9a-f]{16}\.$")


def durable_bytes(root: Path, sources: Iterable[Path]) -> int:
    """Of the contents of `sources`, what stands or is journalled in the store below `root`."""
    return sum(_durable(NodeLayout(str(root)), _manifest(path, path.stat().st_size)) for path in sources)


def _durable(layout: NodeLayout, manifest: ChunkManifest) -> int:
    if Path(layout.checkpoint(manifest.digest)).exists():
        return manifest.size
    journal = Path(layout.checkpoint_journal(manifest.digest))
    lines = _LINE.findall(journal.read_bytes()) if journal.exists() else []
    return sum(manifest.chunks[int(index)].length for index in set(lines))


@functools.cache
def _manifest(path: Path, size: int) -> ChunkManifest:
    with path.open("rb") as file:
        return digest_file(file, size)
