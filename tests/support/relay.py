"""A TCP relay on loopback whose link a test can cut, hold and mend: a bounded stand-in for hotel Wi-Fi."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import threading
from collections.abc import Iterator

from orchestrator.transfer.progress import TokenBucket

_BUFFER_BYTES = 64 * 1024


class Relay:
    """Carries connections from `port` to `target_port` on loopback, all together at `bytes_per_s` if it is given.

    `cut()` resets every connection now; `refuse()` also refuses new ones until `mend()`; `hold()` lets nothing through
    without a sign to either side, a black hole, until `mend()`; `hold_after()` does once so many bytes were carried.
    """

    def __init__(self, target_port: int, bytes_per_s: float | None = None) -> None:
        self._target_port = target_port
        self._bucket = TokenBucket(bytes_per_s)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.bytes_carried = 0
        self._hold_at: float = math.inf
        self.connections_made = 0
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._stranded: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            for end in pair:
                _reset(end)

    def strand(self, *, is_told: bool) -> None:
        """Connections that are there carry nothing ever again, without a word to the server; the client is reset if
        `is_told`. New ones work: the client has moved to another network."""
        with self._lock:
            self._stranded |= self._pairs
            pairs = list(self._pairs)
        for near, _ in pairs if is_told else ():
            _reset(near)

    def refuse(self) -> None:
        self._refusing = True
        self.cut()

    def hold(self) -> None:
        self._flowing.clear()

    @property
    def is_holding(self) -> bool:
        return not self._flowing.is_set()

    def hold_after(self, bytes_carried: int) -> None:
        self._hold_at = bytes_carried

    def mend(self) -> None:
        self._refusing = False
        self._hold_at = math.inf
        self._flowing.set()

    def close(self) -> None:
        self._closed.set()
        self._flowing.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
            except OSError:
                near.close()
                continue
            # Before it is counted: who waits for a connection, and cuts it then, must not miss it.
            with self._lock:
                self._pairs.add((near, far))
            self.connections_made += 1
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        pair = (near, far)
        selector = selectors.DefaultSelector()
        selector.register(near, selectors.EVENT_READ, far)
        selector.register(far, selectors.EVENT_READ, near)
        try:
            while selector.get_map():
                for key, _ in selector.select(timeout=1.0):
                    self._flowing.wait()
                    if pair in self._stranded:
                        self._closed.wait()
                        return
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    data = source.recv(_BUFFER_BYTES)
                    if not data:
                        selector.unregister(source)
                        with contextlib.suppress(OSError):
                            key.data.shutdown(socket.SHUT_WR)
                        continue
                    self._bucket.take(len(data))
                    key.data.sendall(data)
                    self.bytes_carried += len(data)
                    if self.bytes_carried >= self._hold_at:
                        self.hold()
        except OSError:
            if pair in self._stranded:
                self._closed.wait()
        finally:
            with self._lock:
                self._pairs.discard(pair)
            selector.close()
            near.close()
            far.close()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Linger 0 turns the close into a reset, as a router that forgot the flow answers.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def relay_to(target_port: int) -> Iterator[Relay]:
    relay = Relay(target_port)
    try:
        yield relay
    finally:
        relay.close()
