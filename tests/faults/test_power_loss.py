"""A node that loses its power in the middle of an upload: what was synced is trusted, and nothing else is."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ConnectionLostError
from orchestrator.ssh.transport import ByteStream
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.wire.layout import NodeLayout
from tests.support.agent_streams import (
    ChunkLedger,
    ProcessOpener,
    WatchedStream,
    check_stored,
    even_cuts,
    journalled,
    make_node_root,
    manifest_of,
)

MIB = 1024 * 1024
CONTENT = random.Random(3).randbytes(24 * MIB + 7)
MANIFEST = manifest_of(CONTENT, even_cuts(len(CONTENT), 64 * 1024))
NO_PATIENCE = ReconnectPolicy(max_fruitless=0, first_wait_s=0.0, longest_wait_s=0.0)


class MortalNode(ProcessOpener):
    """Its agents are killed all at once, and from then on it cannot be reached."""

    has_power = True

    def lose_power(self) -> None:
        self.has_power = False
        for process in self.processes:
            process.kill()

    def open_agent_stream(
        self, verb: str, request: object, *, idle_timeout_s: float = 60.0, expected_bytes: int | None = None
    ) -> ByteStream:
        try:
            if self.has_power:
                return super().open_agent_stream(
                    verb, request, idle_timeout_s=idle_timeout_s, expected_bytes=expected_bytes
                )
        except AssertionError:  # it was killed before it was ready
            if self.has_power:
                raise
        raise ConnectionLostError("the node is down")


def lose_what_was_not_synced(root: Path, durable: Path, chance: random.Random) -> None:
    """Each block that differs from what was made durable is lost, stays, or is garbage, as a disk may have it; behind
    the journal's durable end stands what may stand there. The files themselves stay: the journal names the part."""
    layout = NodeLayout(str(root))
    part, journal = Path(layout.checkpoint_part(MANIFEST.digest)), Path(layout.checkpoint_journal(MANIFEST.digest))
    kept = durable / part.name
    before = kept.read_bytes() if kept.exists() else bytes(len(CONTENT))
    with part.open("r+b") as file:
        for offset in range(0, len(CONTENT), 4096):
            file.seek(offset)
            block, old = file.read(4096), before[offset : offset + 4096]
            if block != old:
                file.seek(offset)
                file.write(chance.choice([old, block, chance.randbytes(len(old)), bytes(len(old))]))
    synced = (durable / journal.name).read_bytes()
    with journal.open("r+b") as file:
        unsynced = file.read()[len(synced) :]
        torn = unsynced[: chance.randrange(len(unsynced) + 1)]
        file.seek(0)
        file.truncate()
        file.write(synced + chance.choice([b"", torn, torn + bytes(300), b"17 0123"]))


@pytest.mark.parametrize("kill_at", [MIB, 4 * MIB, 9 * MIB])
def test_after_a_power_loss_exactly_what_the_journal_lacks_is_sent(tmp_path: Path, kill_at: int) -> None:
    root, durable, local = make_node_root(tmp_path), tmp_path / "durable", tmp_path / "local"
    durable.mkdir()
    local.write_bytes(CONTENT)
    agent = [sys.executable, "-m", "tests.support.crashing_agent", str(durable)]
    node = MortalNode(root, lambda request: [*agent, request])
    node._wraps = [lambda inner: WatchedStream(inner, kill_at, node.lose_power)] * 2
    with pytest.raises(ConnectionLostError):
        upload_file(node, local, MANIFEST, retry=NO_PATIENCE, streams=StreamPolicy(fixed=2))
    for process in node.processes:
        process.wait(20)
    lose_what_was_not_synced(root, durable, random.Random(kill_at))

    trusted = journalled(root, MANIFEST)
    assert trusted or kill_at < 9 * MIB
    ledger = ChunkLedger()
    again = ProcessOpener(
        root, lambda request: [sys.executable, "-m", "remote_payload", "agent", "stream", request], [ledger.around]
    )
    upload_file(again, local, MANIFEST, streams=StreamPolicy(fixed=1))
    assert sorted(ledger.sent) == sorted(set(range(len(MANIFEST.chunks))) - trusted)
    check_stored(root, MANIFEST, CONTENT)
