"""Upload a file as a client of its own, and die by SIGKILL once so much is on the node.

    python -m tests.support.upload_client NODE_ROOT FILE KILL_AT_BYTES

Prints the bytes sent and the client's and the agent's largest memory in KiB, where it lives to the end.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

from orchestrator.layout import LocalLayout
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.upload import upload_file
from tests.support.agent_streams import ProcessOpener

AGENT = [sys.executable, "-m", "remote_payload", "agent", "stream"]


def main() -> None:
    root, file, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def die(progress: TransferProgress) -> None:
        if progress.bytes_done >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with tempfile.TemporaryDirectory() as cache:
        layout = LocalLayout(Path(cache), Path(cache), Path(cache))
        manifest = digest_local_file(file, layout).manifest
        opener = ProcessOpener(root, lambda request: [*AGENT, request])
        result = upload_file(opener, file, manifest, on_progress=die)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    agents = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(result.bytes_sent, own, agents)


if __name__ == "__main__":
    main()
