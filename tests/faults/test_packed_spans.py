"""Spans that the node packs: fetched or passed on to another node through cuts, flips and lies, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.transfer import fetch, node_files
from orchestrator.transfer.channel import ReconnectPolicy
from orchestrator.transfer.fetch import FetchResult, fetch_file
from orchestrator.transfer.node_copy import NodeCopy
from orchestrator.transfer.node_files import DescribedFile
from orchestrator.transfer.stream_count import StreamPolicy
from orchestrator.transfer.upload import UploadResult
from remote_payload.agent import send
from remote_payload.agent.listing import list_files
from remote_payload.wire.messages import ListRequest
from remote_payload.wire.packing import pack_floats
from remote_payload.wire.packing_rates import PackingRates
from tests.support.agent_streams import (
    CutStream,
    FlipStream,
    ThreadOpener,
    Wrap,
    check_stored,
    even_cuts,
    make_node_root,
    manifest_of,
)
from tests.support.floats import bfloat16, float32

STUBBORN = ReconnectPolicy(max_fruitless=1000, first_wait_s=0.0, longest_wait_s=0.0)
SPAN = 4000
CONTENT = float32(9000) + bfloat16(8000) + b"end"


@pytest.fixture(scope="module", autouse=True)
def small_spans_always_packed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "SPAN_BYTES", SPAN)
        patch.setattr(fetch, "MIN_BYTES", 1)
        patch.setattr(node_files, "MIN_BYTES", 1)
        patch.setattr(PackingRates, "pays", lambda self, packers: True)
        yield


def bring(folder: Path, wraps: list[Wrap] | None = None, streams: int = 1) -> FetchResult:
    """Fetch `source` in the folder to `target` there."""
    root, source = make_node_root(folder), folder / "source"
    source.write_bytes(CONTENT)
    listed = list_files(ListRequest(str(root), str(source))).files[0]
    opener = ThreadOpener(root, wraps or [])
    return fetch_file(
        opener, str(source), listed, folder / "target", streams=StreamPolicy(fixed=streams), retry=STUBBORN
    )


def copy(folder: Path, from_wraps: list[Wrap], to_wraps: list[Wrap], streams: int = 1) -> UploadResult:
    """Copy `source` in the folder to the store below `other` there, and look at it."""
    (folder / "other").mkdir()
    root, other, source = make_node_root(folder), make_node_root(folder / "other"), folder / "source"
    source.write_bytes(CONTENT)
    listed = list_files(ListRequest(str(root), str(source))).files[0]
    manifest = manifest_of(CONTENT, even_cuts(len(CONTENT), SPAN))
    node_copy = NodeCopy(
        ThreadOpener(root, from_wraps),
        ThreadOpener(other, to_wraps),
        streams=StreamPolicy(fixed=streams),
        retry=STUBBORN,
    )
    with node_copy:
        done = node_copy([DescribedFile(str(source), listed, manifest)], manifest)
    check_stored(other, manifest, CONTENT)
    return done


CUTS = st.lists(st.integers(50, 30_000), max_size=3)
FLIPS = st.lists(st.integers(100, 30_000), max_size=2)


def damaging(cuts: list[int], flips: list[int]) -> list[Wrap]:
    wraps: list[Wrap] = [lambda inner, at=at: CutStream(inner, None, at) for at in cuts]  # type: ignore[misc]
    wraps += [lambda inner, at=at: FlipStream(inner, read_at=at) for at in flips]  # type: ignore[misc]
    return wraps


@settings(max_examples=25, deadline=None)
@given(streams=st.integers(1, 3), cuts=CUTS, flips=FLIPS)
def test_packed_spans_through_any_cuts_and_flips_arrive_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, streams: int, cuts: list[int], flips: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("fetch")
    done = bring(folder, damaging(cuts, flips), streams)
    assert (folder / "target").read_bytes() == CONTENT
    assert done.bytes_received + done.bytes_packed == len(CONTENT)
    assert done.bytes_packed > 0.1 * len(CONTENT)


@settings(max_examples=25, deadline=None)
@given(streams=st.integers(1, 2), cuts=CUTS, flips=FLIPS, links=st.lists(st.integers(0, 30_000), max_size=2))
def test_packed_chunks_from_node_to_node_through_any_cuts_and_flips_arrive_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, streams: int, cuts: list[int], flips: list[int], links: list[int]
) -> None:
    to_wraps: list[Wrap] = [lambda inner, at=at: CutStream(inner, at, None) for at in links]  # type: ignore[misc]
    done = copy(tmp_path_factory.mktemp("copy"), damaging(cuts, flips), to_wraps, streams)
    if not (cuts or flips or links):
        assert done.bytes_packed == len(CONTENT) - done.bytes_sent > 0.1 * len(CONTENT)


def shortened(body: bytes) -> bytes:
    return body[:-1]


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes((body[-1] ^ 1,))


@pytest.fixture(params=[shortened, flipped])
def packed_wrongly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How large the bodies were that the node damaged: the first two."""
    damage: Callable[[bytes], bytes] = request.param
    damaged: list[int] = []

    def pack_wrongly(data: bytes | bytearray) -> bytes | None:
        packed = pack_floats(data)
        if packed is None or len(damaged) == 2:
            return packed
        damaged.append(len(packed))
        return damage(packed)

    monkeypatch.setattr(send, "pack_floats", pack_wrongly)
    return damaged


def test_a_span_that_was_packed_wrongly_is_asked_for_again(packed_wrongly: list[int], tmp_path: Path) -> None:
    bring(tmp_path)
    assert len(packed_wrongly) == 2
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_chunk_that_was_packed_wrongly_is_refused_by_the_other_node_and_goes_again_as_it_is(
    packed_wrongly: list[int], tmp_path: Path
) -> None:
    done = copy(tmp_path, [], [])
    assert len(packed_wrongly) == 2
    assert done.bytes_sent + done.bytes_packed == len(CONTENT) + 2 * SPAN


def test_packing_takes_neither_side_much_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bfloat16(1024 * 1024) * 32)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.transfer.fetch import fetch_file\n"
        "from remote_payload.wire.packing_rates import PackingRates\n"
        "from orchestrator.transfer.stream_count import StreamPolicy\n"
        "from remote_payload.agent.listing import list_files\n"
        "from remote_payload.wire.messages import ListRequest\n"
        "from tests.support.agent_streams import ProcessOpener\n"
        "PackingRates.pays = lambda self, packers: True\n"
        "root, source, target = sys.argv[1:]\n"
        "agent = [sys.executable, '-m', 'remote_payload', 'agent', 'stream']\n"
        "done = fetch_file(ProcessOpener(Path(root), lambda request: [*agent, request]), source,\n"
        "    list_files(ListRequest(root, source)).files[0], Path(target), streams=StreamPolicy(fixed=4))\n"
        "usages = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "print(done.bytes_packed, *usages)\n"
    )
    # A process counts the memory of the one that it was forked from; a shell between us keeps the tests' own out of it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]
    command += [str(make_node_root(tmp_path)), str(source), str(tmp_path / "target")]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2]
    )
    packed, client_kib, agent_kib = map(int, out.stdout.split())
    assert packed > 0.2 * source.stat().st_size
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert client_kib < 200 * 1024
    assert agent_kib < 100 * 1024
