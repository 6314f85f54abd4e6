"""One job at a time beside the main thread: waiting for a disk must not keep a stream from being read."""

from __future__ import annotations

import threading
from typing import Callable, Optional


class Background:
    """Runs jobs in turn in a thread. What one raises is raised, once, by the next `start` or `wait`."""

    def __init__(self) -> None:
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[Exception] = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, then begin this one."""
        self.wait()
        thread = threading.Thread(target=self._run, args=(job,), name="background")
        self._thread = thread
        thread.start()

    def wait(self) -> None:
        """Wait for the job that runs, if one does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits
            self._error = error
