"""The agent's streams on a machine whose power may fail: what each sync made durable is copied to a folder.

    python -m tests.support.crashing_agent DURABLE_FOLDER REQUEST

After the process was killed, the copies are what its disk is sure to hold.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path

from remote_payload.agent import partial_file
from remote_payload.agent.__main__ import main

DURABLE = Path(sys.argv[1])


def sync_and_copy(fd: int) -> None:
    source = Path(f"/proc/self/fd/{fd}").readlink()
    copying = DURABLE / f"{source.name}.{os.getpid()}"
    with (DURABLE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an older copy must not replace a newer one
        os.fdatasync(fd)
        shutil.copyfile(source, copying)
        copying.rename(DURABLE / source.name)


if __name__ == "__main__":
    partial_file.SYNC_BYTES = 1024 * 1024
    partial_file._data_sync = sync_and_copy
    sys.exit(main(["stream", sys.argv[2]]))
