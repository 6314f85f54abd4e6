"""Several clients that send different files into a store that cannot hold them all, at the same time."""

from __future__ import annotations

import concurrent.futures
import random
from pathlib import Path

import pytest

from orchestrator.errors import NoSpaceError
from orchestrator.transfer.upload import upload_file
from remote_payload.agent.store import stored_files
from remote_payload.wire.layout import NodeLayout
from tests.support.agent_streams import ThreadOpener, even_cuts, make_node_root, manifest_of

SIZE = 1_000_000
LIMIT = 2_600_000


@pytest.mark.parametrize("has_run", [True, False])
def test_together_they_never_exceed_the_limit_and_what_was_finished_is_whole(tmp_path: Path, has_run: bool) -> None:
    root = make_node_root(tmp_path)
    layout = NodeLayout(str(root))

    def upload(number: int) -> str | None:
        content = random.Random(number).randbytes(SIZE)
        path, manifest = tmp_path / str(number), manifest_of(content, even_cuts(SIZE, 50_000))
        path.write_bytes(content)
        run_id = f"run-{number}" if has_run else ""
        try:
            done = upload_file(ThreadOpener(root), path, manifest, run_id=run_id, store_limit_bytes=LIMIT)
        except NoSpaceError:
            return None
        finally:
            assert sum(file.size for file in stored_files(layout)) <= LIMIT
        assert done.bytes_sent == SIZE
        return manifest.digest

    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        ends = list(clients.map(upload, range(6)))
    stored = {file.digest for file in stored_files(layout) if Path(layout.checkpoint(file.digest)).exists()}
    assert len(stored) == 2
    assert stored <= set(ends)
    if has_run:  # which pins it until it was launched
        assert stored == set(ends) - {None}
    for digest in stored:
        number = ends.index(digest)
        assert Path(layout.checkpoint(digest)).read_bytes() == (tmp_path / str(number)).read_bytes()
