"""Uploads to a disk, or a quota, that does not hold them, or that somebody else fills meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import NoSpaceError
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.upload import upload_file
from remote_payload.agent.partial_file import SYNC_BYTES
from remote_payload.probe import Probe
from remote_payload.wire.chunks import ChunkManifest
from remote_payload.wire.results import Severity
from remote_payload.wire.run_messages import PreflightRequest
from tests.support.agent_streams import (
    ChunkLedger,
    WatchedStream,
    check_not_stored,
    check_stored,
    even_cuts,
    journalled,
    manifest_of,
)
from tests.support.sharing import mountable
from tests.support.small_disk import SmallDisk, limited_files, quota_disk, silent_quota, small_file_system

MIB = 1024 * 1024
DISK_BYTES = 12 * MIB
AT_ONCE = ReconnectPolicy(max_fruitless=3, first_wait_s=0.0, longest_wait_s=0.0)


@pytest.fixture(params=["file system", "quota"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """A small file system where this user may make one; a quota everywhere."""
    with small_file_system(tmp_path, DISK_BYTES) as found:
        is_quota = request.param == "quota" or found is None
        yield quota_disk(tmp_path, DISK_BYTES) if is_quota or found is None else found


def write_file(folder: Path, name: str, size: int, chunk_bytes: int = 256 * 1024) -> tuple[Path, bytes, ChunkManifest]:
    content = random.Random(name).randbytes(size)
    (folder / name).write_bytes(content)
    return folder / name, content, manifest_of(content, even_cuts(size, chunk_bytes))


def test_a_file_that_does_not_fit_is_refused_before_a_chunk_is_sent(disk: SmallDisk, tmp_path: Path) -> None:
    path, _, manifest = write_file(tmp_path, "large", 20 * MIB)
    ledger = ChunkLedger()
    with pytest.raises(NoSpaceError) as refused:
        upload_file(disk.opener([ledger.around]), path, manifest, retry=AT_ONCE)
    assert ledger.sent == []
    assert refused.value.cause.startswith("21.0 MB are still to come and 12.")
    assert f"free on {disk.name}; the store at" in refused.value.cause
    check_not_stored(disk.root, manifest)


def test_what_the_disk_lacks_is_freed_from_the_store(disk: SmallDisk, tmp_path: Path) -> None:
    old, new = write_file(tmp_path, "old", 7 * MIB), write_file(tmp_path, "new", 9 * MIB)
    for path, content, manifest in (old, new):
        upload_file(disk.opener(), path, manifest, retry=AT_ONCE)
        check_stored(disk.root, manifest, content)
    check_not_stored(disk.root, old[2])


@pytest.mark.parametrize("chunk_bytes", [256 * 1024, 4 * 1024])
def test_a_disk_that_somebody_fills_in_the_middle_costs_only_what_is_missing(tmp_path: Path, chunk_bytes: int) -> None:
    path, content, manifest = write_file(tmp_path, "file", 8 * MIB, chunk_bytes)
    ledger, later = ChunkLedger(), ChunkLedger()
    with small_file_system(tmp_path, DISK_BYTES) as found:
        disk = found or limited_files(tmp_path, 4 * MIB)
        fill_up = lambda inner: ledger.around(WatchedStream(inner, 3 * MIB, disk.fill))  # noqa: E731
        with pytest.raises(NoSpaceError, match=r"(full|limit).* are free, .* still missing") as told:
            upload_file(disk.opener([fill_up]), path, manifest, retry=AT_ONCE)
        assert f"on {disk.name}" in told.value.cause
        check_not_stored(disk.root, manifest)
        kept = journalled(disk.root, manifest)
        assert ledger.acknowledged <= kept
        assert len(kept) * chunk_bytes > MIB
        disk.make_room()
        upload_file(disk.opener([later.around]), path, manifest, retry=AT_ONCE)
        assert sorted(later.sent) == sorted(set(range(len(manifest.chunks))) - kept)
        check_stored(disk.root, manifest, content)


@pytest.mark.skipif("btrfs" not in mountable(), reason="no Btrfs can be mounted here by this user")
def test_a_quota_of_which_no_program_tells_is_what_is_full_and_costs_only_what_is_missing(tmp_path: Path) -> None:
    path, content, manifest = write_file(tmp_path, "file", 80 * MIB, MIB)
    later = ChunkLedger()
    with silent_quota(tmp_path, 60 * MIB) as disk:
        with pytest.raises(NoSpaceError) as told:
            upload_file(disk.opener(), path, manifest, retry=AT_ONCE)
        assert told.value.cause.startswith(f"the quota is used up, on {disk.name}: ")
        assert "free" not in told.value.cause
        check_not_stored(disk.root, manifest)
        kept = journalled(disk.root, manifest)
        # What was not made durable yet has no room for its lines in the journal, on a disk that copies on write.
        assert len(kept) * MIB >= SYNC_BYTES // 2
        disk.make_room()
        upload_file(disk.opener([later.around]), path, manifest, retry=AT_ONCE)
        assert sorted(later.sent) == sorted(set(range(len(manifest.chunks))) - kept)
        check_stored(disk.root, manifest, content)


def test_preflight_refuses_a_full_disk_unless_an_upload_would_make_room_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = quota_disk(tmp_path, 100 * MIB)
    path, _, manifest = write_file(tmp_path, "old", 80 * MIB, 8 * MIB)
    upload_file(disk.opener(), path, manifest)
    monkeypatch.setenv("PATH", disk.prefix[1].partition("=")[2])

    def severity(needed_bytes: int) -> Severity:
        probe = Probe(PreflightRequest(str(disk.root), gpu_policy="cpu", needed_bytes=needed_bytes), None)
        probe._look_at_disk()
        (finding,) = probe.result.findings
        assert finding.id == "node.low_disk"
        return finding.severity

    assert severity(0) is Severity.ERROR
    assert severity(50 * MIB) is Severity.WARNING
