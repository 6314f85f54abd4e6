"""The process that carries a bulk stream, with a small shell script in the place of `ssh`."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
import threading
from pathlib import Path

from orchestrator.errors import ConnectionLostError, RemoteEvalError
from orchestrator.ssh.bulk_process import PIPE_BYTES, BulkProcess
from tests.support.world import until


def test_a_writer_hears_that_the_connection_was_lost_where_another_thread_ends_the_stream_meanwhile(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    # Its agent is gone, and it itself is yet to see that nobody wants its input any more.
    process = BulkProcess(["sh", "-c", 'exec 1>&-; read go < "$0"', str(gate)], "node", os.environ)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            process.write(bytes(4 * PIPE_BYTES), 60.0)
        except (RemoteEvalError, ValueError, OSError) as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: _unread_bytes(process) == fcntl.fcntl(process._stdin, fcntl.F_GETPIPE_SZ))
        process.close_write()
        gate.write_text("\n")
        writer.join(60)
    finally:
        process.close()
    assert [type(error) for error in errors] == [ConnectionLostError]


def _unread_bytes(process: BulkProcess) -> int:
    """In the pipe that the process reads."""
    return int(struct.unpack("i", fcntl.ioctl(process._stdin, termios.FIONREAD, b"\0" * 4))[0])
