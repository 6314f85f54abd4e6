"""Sending a file while it is still being hashed, or before it may take the place of others on the node: what the node
lacks goes, and what it has elsewhere it copies meanwhile.

The node keeps it as a part, under a digest that stands for the file as long as its own is not known, and the upload
proper adopts that part. Nothing depends on a draft: whatever goes wrong with one is left to the upload to meet.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator import standby
from orchestrator.errors import RemoteEvalError
from orchestrator.transfer.carrier import Carrier, Sent
from orchestrator.transfer.flight import Flight
from orchestrator.transfer.progress import ProgressListener, ProgressMeter
from orchestrator.transfer.sender import Sender
from orchestrator.transfer.source import LocalFile
from remote_payload.wire.chunk_table import MAX_CHUNKS, DraftTable, pack_chunks, pack_unknown
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import PREFIX_BYTES, KnownChunks
from remote_payload.wire.names import FILE_DIGEST_PREFIX
from remote_payload.wire.stream import ReceiveRequest

WORTH_S = 0.5
"""A draft is begun where reading the rest of the file takes so much longer."""
_WAIT_S = 5.0


class Draft:
    """Hears of chunks as they are hashed (a `HashListener`), sends those that the node lacks and names the others.

    Of a file that need not be hashed it hears at once: `remembered`.
    `order` says which chunks are to go, and in which order. `ask_known` asks the node what it has. While something else
    `is_awaited` a draft pays however soon the file will have been hashed.
    """

    def __init__(
        self,
        carrier: Carrier,
        path: Path,
        *,
        order: Callable[[Sequence[tuple[int, int]]], Sequence[int]],
        ask_known: Callable[[int], KnownChunks],
        on_progress: ProgressListener,
        run_id: str = "",
        store_limit_bytes: int | None = None,
        is_awaited: Callable[[], bool] = lambda: False,
    ) -> None:
        self.carrier = carrier
        self.sent = Sent()
        self.bytes_reused = 0
        self.error: RemoteEvalError | OSError | None = None
        self._path = path
        self._digest = ""
        self._known_digest = ""
        self._order_of = order
        self._ask_known = ask_known
        self._on_progress = on_progress
        self._run_id = run_id
        self._store_limit_bytes = store_limit_bytes
        self._is_awaited = is_awaited
        self._state = threading.Condition()
        self._packed = b""
        self._table: DraftTable | None = None
        self._flight: Flight | None = None
        self._thread: threading.Thread | None = None
        self._wanted = frozenset[int]()
        self._waiting: list[int] = []
        self._known: frozenset[bytes] | None = None
        self._unknown = set[bytes]()
        self._known_waiting: list[int] = []
        self._is_worth_it = False
        self._is_all_hashed = False
        self._is_over = False
        self._is_given_up = False
        self._is_broken_off = False
        self._file: LocalFile | None = None
        self._began_at = 0.0
        self._hashed_bytes = 0

    @property
    def digest(self) -> str:
        """What stands for the file's digest on the node, where an earlier draft may be, of a client that did not know
        it."""
        return self._digest or draft_digest(self._path)

    @property
    def bytes_arrived(self) -> int:
        return self._flight.arrived_bytes if self._flight is not None else 0

    def begun(self, spans: Sequence[tuple[int, int]], /) -> Sequence[int]:
        order = self._begin(spans, pack_unknown(length for _, length in spans))
        return [*order, *(index for index in range(len(spans)) if index not in self._wanted)]

    def remembered(self, manifest: ChunkManifest) -> None:
        """Instead of all that is heard of a file while it is hashed. What goes of it goes into the part of its own
        digest."""
        self._known_digest = manifest.digest
        for index in self._begin(manifest.spans, pack_chunks(manifest.chunks)):
            self.hashed(index, bytes.fromhex(manifest.chunks[index].sha256))

    def hashed(self, index: int, sha256: bytes, /) -> None:
        if self._table is None:
            return
        self._table.set_sha256(index, sha256)
        with self._state:
            self._hashed_bytes += self._table.length(index)
            if index in self._wanted:
                self._waiting.append(index)
            self._offer()

    def hashed_all(self) -> None:
        """Once what was hashed has gone, and the node has copied what it could, the streams go on stand-by and let go
        of the part: another client that wants it need not wait for the end of the draft."""
        self._is_all_hashed = True

    def end(self, *, is_given_up: bool = False) -> None:
        """Send nothing more, and wait for what is under way; the streams stand by then. `is_given_up`: nobody will ever
        adopt it, and the node deletes it, unless it is the part of the file's own digest."""
        with self._state:
            # What stands under the file's own digest may be more than what came as a draft.
            self._is_over, self._is_given_up = True, is_given_up and not self._known_digest
            self._state.notify_all()
        if self._flight is not None:
            self._flight.stop()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Give back what it holds here; one that has not ended is broken off."""
        with self._state:
            self._is_broken_off = not self._is_over
        if self._is_broken_off:
            self.carrier.end_streams()
        self.end()
        self.carrier.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin(self, spans: Sequence[tuple[int, int]], packed: bytes) -> Sequence[int]:
        """The chunks that are to go, in their order."""
        order = self._order_of(spans)
        self._wanted = frozenset(order)
        self._began_at = time.monotonic()
        if len(spans) <= MAX_CHUNKS:
            self._packed = packed
            self._table = DraftTable(packed, sum(length for _, length in spans))
            self._flight = Flight(self._table, (), is_growing=True)
            self._thread = threading.Thread(target=self._run, name="draft", daemon=True)
            self._thread.start()
        return order

    def _offer(self) -> None:
        """Hand over what the node lacks, each content once, and name what it has, which waits for something that it
        lacks: till then the file may be one that the node has. For a holder of `_state`."""
        if self._table is None or self._flight is None or self._is_over:
            return
        if self._known is None:
            seconds = time.monotonic() - self._began_at
            left_s = seconds * (self._table.size - self._hashed_bytes) / max(1, self._hashed_bytes)
            self._is_worth_it = left_s >= WORTH_S or self._is_awaited()
            self._state.notify_all()
            return
        waiting, self._waiting = self._waiting, []
        for index in waiting:
            prefix = self._table.sha256(index)[:PREFIX_BYTES]
            if prefix in self._known:
                self._known_waiting.append(index)
            elif prefix not in self._unknown:
                self._unknown.add(prefix)
                self._flight.add(index)
        if self._unknown:
            named, self._known_waiting = self._known_waiting, []
            for index in named:
                self._flight.name(index)
            self._state.notify_all()

    def _add_reused(self, count: int) -> None:
        with self._state:
            self.bytes_reused += count

    def _run(self) -> None:
        table, flight = self._table, self._flight
        if table is None or flight is None:
            return
        try:
            if not self._await_that(lambda: self._is_worth_it):
                return
            self._digest = draft_digest(self._path)
            known = self._ask_known(table.size)
            if known.is_size_there:
                return
            with self._state:
                self._known = known.as_set()
                self._offer()
            if self._await_that(lambda: flight.has_work):
                self._carry(table, flight)
        except (RemoteEvalError, OSError) as error:
            self.error = error
        finally:
            flight.stop()

    def _await_that(self, holds: Callable[[], bool]) -> bool:
        """Whether it came to hold before the draft was over."""
        with self._state:
            self._state.wait_for(lambda: holds() or self._is_over)
            return not self._is_over

    def _carry(self, table: DraftTable, flight: Flight) -> None:
        self._file = LocalFile(self._path)
        total_bytes = sum(map(table.length, self._wanted))
        meter = ProgressMeter(total_bytes)
        is_here = threading.Event()
        request = ReceiveRequest(
            self.carrier.opener.layout.root,
            self._known_digest or self._digest,
            table.size,
            len(table),
            secrets.token_hex(16),
            _WAIT_S,
            standby.AGENT_IDLE_S,
            run_id=self._run_id,
            store_limit_bytes=self._store_limit_bytes,
            is_draft=True,
            adopts=self._digest if self._known_digest else "",
        )
        sender = Sender(
            self._file,
            self._packed,
            table,
            flight,
            self.carrier,
            self.sent,
            lambda _have: is_here.set(),
            self._add_reused,
            is_given_up=lambda: self._is_given_up,
        )

        def tell(streams: int) -> None:
            moved = flight.arrived_bytes
            if self._is_all_hashed and flight.is_idle:
                flight.stop()
            self._on_progress(meter.measure(moved, 0, streams, bytes_packed=self.sent.bytes_packed))

        self.carrier.expect(total_bytes)
        self.carrier.carry(
            request,
            flight,
            sender.serve,
            self.sent,
            has_begun=is_here.is_set,
            is_over=lambda: self._is_broken_off or sender.finished is not None,
            on_tick=tell,
        )


def draft_digest(path: Path) -> str:
    """A digest that no file has, the same for a file in the same state: a client that was killed comes back to it."""
    facts = path.stat()
    words = f"draft {str(path.resolve())!r} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    return FILE_DIGEST_PREFIX + hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()
