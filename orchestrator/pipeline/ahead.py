"""What of sending a local checkpoint goes on beside preflight: hashing, and for a file the streams' logins and a draft.

The node's torch may take a minute to be imported, and nothing of a file needs it to be sent. What is refused without an
import is refused before a byte of the file goes; where preflight fails, what goes on is broken off, and what arrived
stays as a part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from orchestrator.errors import InternalError, RemoteEvalError
from orchestrator.node import BULK_BYTES
from orchestrator.pipeline.context import RunContext
from orchestrator.pipeline.send import ask_known, draft_to_node
from orchestrator.transfer.draft import Draft
from orchestrator.transfer.fingerprints import LocalFile, digest_local_file
from orchestrator.transfer.local_folder import LocalFolder
from orchestrator.transfer.progress import ProgressListener
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.messages import PREFIX_BYTES, KnownChunks

Order = Callable[[Sequence[tuple[int, int]]], Sequence[int]]


class _BrokenOffError(Exception):
    """Nobody wants the file's digest any more."""


class Ahead:
    """A local file that is read, and drafted, by a thread of its own, for the time of the context; a folder is read.

    `order` says which chunks a draft sends, and in which order. None of the methods is for several threads.
    """

    def __init__(self, context: RunContext, path: Path | None, order: Order, on_progress: ProgressListener) -> None:
        """`path` None: there is nothing to send, and `begin` does nothing."""
        self.path = path
        self.has_streams = False
        self._context = context
        self._order = order
        self._on_progress = on_progress
        self._folder: LocalFolder | None = None
        self._draft: Draft | None = None
        self._known: KnownChunks | None = None
        self._refuse: Callable[[int], None] | None = None
        self._refusal: RemoteEvalError | None = None
        self._has_answer = threading.Event()
        self._is_preflight_over = threading.Event()
        self._is_broken_off = threading.Event()
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._reading: Future[LocalFile] | None = None

    def begin(self, refuse: Callable[[int], None]) -> None:
        """Begin beside preflight, where the file is large enough for streams of its own. `refuse` hears the bytes that
        the file takes and raises what preflight can say at once; it is called in another thread, before any go."""
        if self.path is None:
            return
        if self.path.is_dir():
            self.folder()
        elif self.path.stat().st_size >= BULK_BYTES:
            self._refuse = refuse
            self._start(self.path)

    def finish(self) -> tuple[LocalFile, Draft]:
        """The file as it was read, and what went of it. Preflight had nothing against the run. Raises what
        `digest_local_file` does."""
        self._is_preflight_over.set()
        self._has_answer.set()
        if self.path is None:
            raise InternalError("there is no local file to be sent")
        if self._reading is None:
            self._start(self.path)
        if self._reading is None or self._draft is None:
            raise InternalError("the local file is not read")
        return self._reading.result(), self._draft

    def folder(self) -> LocalFolder:
        """Of a folder, what is being read, or has been. Raises what making one does."""
        if self.path is None:
            raise InternalError("there is no local folder to be sent")
        if self._folder is None:
            self._folder = LocalFolder(self.path, self._context.services.layout)
        return self._folder

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the draft and the reading; streams that nobody took are the node's to close."""
        self._is_broken_off.set()
        self._has_answer.set()
        if self._draft is not None:
            self._draft.close()
        if self._folder is not None:
            self._folder.close()
        self._pool.shutdown()

    def begun(self, spans: Sequence[tuple[int, int]], /) -> Sequence[int]:
        """For `digest_local_file`."""
        draft = self._unless_broken_off()
        self._begin_asking(sum(length for _, length in spans))
        return draft.begun(spans)

    def hashed(self, index: int, sha256: bytes, /) -> None:
        """For `digest_local_file`."""
        self._unless_broken_off().hashed(index, sha256)

    def _unless_broken_off(self) -> Draft:
        if self._draft is None or self._is_broken_off.is_set():
            raise _BrokenOffError
        return self._draft

    def _start(self, path: Path) -> None:
        self._context.node.connect()  # before any thread: a login may ask a person
        self._draft = draft_to_node(
            self._context,
            path,
            self._order,
            self._on_progress,
            ask_known=self._ask_known,
            is_awaited=lambda: not self._is_preflight_over.is_set(),
        )
        self._reading = self._pool.submit(self._read, path)

    def _read(self, path: Path) -> LocalFile:
        file = digest_local_file(path, self._context.services.layout, self)
        if file.was_remembered and self._is_lacking(file.manifest):
            self._begin_asking(file.manifest.size)
            self._unless_broken_off().remembered(file.manifest)
            self.has_streams = True
        self._unless_broken_off().hashed_all()
        return file

    def _is_lacking(self, manifest: ChunkManifest) -> bool:
        """Whether the node seems to lack something that is to be sent; False once nobody waits for preflight."""
        if self._is_preflight_over.is_set():
            return False
        try:
            self._known = ask_known(self._context, manifest.size)
        except RemoteEvalError:
            return False
        prefixes = self._known.as_set()
        wanted = (manifest.chunks[index] for index in self._order(manifest.spans))
        return not self._known.is_size_there and any(
            bytes.fromhex(chunk.sha256)[:PREFIX_BYTES] not in prefixes for chunk in wanted
        )

    def _begin_asking(self, size: int) -> None:
        if self._refuse is not None:
            asking = threading.Thread(target=self._ask, args=(self._refuse, size), name="refuse", daemon=True)
            asking.start()

    def _ask(self, refuse: Callable[[int], None], size: int) -> None:
        try:
            refuse(size)
        except RemoteEvalError as error:
            self._refusal = error
        self._has_answer.set()

    def _ask_known(self, size: int) -> KnownChunks:
        """What the node has, once the file may go; raises why it may not."""
        known = self._known if self._known is not None else ask_known(self._context, size)
        self._has_answer.wait()
        if self._refusal is not None and not self._is_preflight_over.is_set():
            raise self._refusal
        return known
