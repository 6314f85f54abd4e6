"""Upload a file to a node behind an sshd, as a client of its own.

    python -m tests.support.upload_over_sshd SETTINGS_JSON

Prints a JSON line for each report of progress, and one with the result.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import build_payload
from orchestrator.profiles import ClusterProfile
from orchestrator.ssh.connect import connect
from orchestrator.transfer.fingerprints import digest_local_file
from orchestrator.transfer.progress import TransferProgress
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import upload_file
from tests.support.sshd import Sshd


@dataclasses.dataclass(frozen=True)
class Client:
    """What one client does: `limit` in bytes/s."""

    profile: dict[str, object]
    file: str
    streams: int
    limit: float

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.support.upload_over_sshd", json.dumps(dataclasses.asdict(self))]


def profile_for(server: Sshd, node_root: Path) -> dict[str, object]:
    settings = server.settings()
    return {
        "host": settings.host,
        "user": settings.user,
        "port": settings.port,
        "identity_files": [str(server.client_key)],
        "known_hosts_file": str(server.known_hosts),
        "ssh_config_file": "/dev/null",
        "node_root": str(node_root),
        "python": {"path": sys.executable},
    }


def main() -> None:
    client = Client(**json.loads(sys.argv[1]))
    profile = ClusterProfile.model_validate(client.profile)

    def show(progress: TransferProgress) -> None:
        print(json.dumps({"bytes_done": progress.bytes_done, "streams": progress.streams}), flush=True)

    with tempfile.TemporaryDirectory() as home:
        layout = LocalLayout(Path(home) / "data", Path(home) / "config", Path(home) / "cache")
        log_in = lambda: connect(profile.connection(), profile.retry_policy(), sockets_folder=Path(home) / "s")  # noqa: E731
        manifest = digest_local_file(Path(client.file), layout).manifest
        with Node(profile, build_payload(layout), log_in) as node:
            done = upload_file(
                node,
                Path(client.file),
                manifest,
                streams=StreamPolicy(fixed=client.streams),
                bandwidth_limit_bytes_per_s=client.limit,
                on_progress=show,
            )
    print(json.dumps({"path": done.path_on_node, "bytes_sent": done.bytes_sent, "bytes_saved": done.bytes_saved}))


if __name__ == "__main__":
    main()
