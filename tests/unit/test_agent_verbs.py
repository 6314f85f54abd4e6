"""Verbs called in this process, on real files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.transfer.upload import upload_file
from remote_payload.agent import digests, files, machine
from remote_payload.agent.__main__ import answer
from remote_payload.agent.failure import AgentError
from remote_payload.agent.hello import hello
from remote_payload.agent.locate import locate
from remote_payload.agent.unpack import unpack_code
from remote_payload.agent.verbs import VERBS, perform
from remote_payload.wire import PROTOCOL_VERSION
from remote_payload.wire.chunks import digest_file
from remote_payload.wire.layout import MARKER_NAME, NodeLayout, attempt_at
from remote_payload.wire.messages import HelloRequest, LocateRequest, UnpackRequest
from remote_payload.wire.names import WireError
from tests.support.agent_streams import ThreadOpener


@pytest.fixture
def node(tmp_path: Path) -> NodeLayout:
    return NodeLayout(hello(HelloRequest(str(tmp_path / "root"))).root)


@contextlib.contextmanager
def refused(kind: str, words: str) -> Iterator[None]:
    with pytest.raises(AgentError, match=words) as caught:
        yield
    assert caught.value.failure.kind == kind


# hello


def test_hello_makes_a_private_root_with_our_marker_and_again_finds_it(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b c"
    first = hello(HelloRequest(str(wanted)))
    assert first.root == str(wanted)
    assert first.root_writable
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700
    assert (wanted / MARKER_NAME).is_file()
    assert [path.name for path in wanted.iterdir()] == [MARKER_NAME]
    assert hello(HelloRequest(str(wanted), create=False)).machine_id == first.machine_id


def test_hello_expands_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert hello(HelloRequest("~/here")).root == str(tmp_path / "here")
    assert hello(HelloRequest("$SCRATCH/x")).root == str(tmp_path / "scratch" / "x")
    with refused("usage", "no absolute path"):
        hello(HelloRequest("$NOT_SET_HERE/x"))
    with refused("usage", "no absolute path"):
        hello(HelloRequest("relative"))


def test_a_root_that_is_not_ours_to_take_is_refused(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir(mode=0o700)
    (full / "thesis.tex").write_text("mine")
    with refused("unfit", "holds other files"):
        hello(HelloRequest(str(full)))
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    (tmp_path / "link").symlink_to(full)
    with refused("unfit", "symbolic link"):
        hello(HelloRequest(str(tmp_path / "link")))
    (tmp_path / "file").write_text("")
    with refused("unfit", "cannot be created"):
        hello(HelloRequest(str(tmp_path / "file")))
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with refused("unfit", "other users may write"):
        hello(HelloRequest(str(open_to_all)))
    with refused("not_found", "does not exist"):
        hello(HelloRequest(str(tmp_path / "absent"), create=False))


def test_a_root_of_another_user_is_refused(tmp_path: Path) -> None:
    theirs = Path("/usr")
    if os.geteuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, 12345, 12345)
    with refused("unfit", "belongs to another user"):
        hello(HelloRequest(str(theirs)))


def test_a_root_where_the_payload_was_installed_first_is_ours(tmp_path: Path) -> None:
    (tmp_path / "root" / "payloads").mkdir(parents=True, mode=0o700)
    assert hello(HelloRequest(str(tmp_path / "root"))).root_writable


def test_ten_hellos_at_once_all_find_the_root_ours(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    found: list[str] = []

    def greet() -> None:
        found.append(hello(HelloRequest(root)).root)

    threads = [threading.Thread(target=greet) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [root] * 10


# files and processes


def test_of_many_who_create_the_same_file_one_wins_and_nobody_sees_half(tmp_path: Path) -> None:
    path = str(tmp_path / "once")
    texts = [bytes([65 + i]) * 50_000 for i in range(16)]
    won: list[bytes] = []
    barrier = threading.Barrier(len(texts))

    def create(text: bytes) -> None:
        barrier.wait()
        if files.create_once(path, text):
            won.append(text)
        assert files.read_up_to(path, 10**6) in texts

    threads = [threading.Thread(target=create, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert (tmp_path / "once").read_bytes() == won[0]
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_reading_follows_no_link_and_waits_for_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "absent"):
        assert files.read_up_to(str(tmp_path / name), 100) is None


def test_a_process_is_alive_until_it_ends_even_as_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        identity = machine.identity(process.pid)
        assert identity is not None
        assert machine.is_alive(identity)
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert machine.is_alive(identity) is False
        assert machine.identity(process.pid) is None


def test_ps_tells_the_same_processes_as_proc() -> None:
    from_ps = dict(machine._command_lines_from_ps())
    assert os.getpid() in from_ps
    assert machine._start_time_from_ps(os.getpid())
    assert machine._start_time_from_ps(os.getpid()) == machine._start_time_from_ps(os.getpid())
    assert machine._start_time_from_ps(2**22 - 1) is None


def test_a_process_is_found_by_a_word_of_its_command_line() -> None:
    word = os.urandom(16).hex()
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [found.pid for found in machine.processes_with_argument(word)] == [process.pid]
        assert machine.processes_with_argument(word[:16]) == ()


@pytest.mark.parametrize(
    "folder",
    [
        "relative/runs/r/attempt-1",
        "/root/runs/r/attempt-0",
        "/root/runs/r/attempt-01",
        "/root/runs/r",
        "/root/runs/R/attempt-1",
        "/root/elsewhere/r/attempt-1",
        "/root/runs/r/attempt-1/",
        "/root/runs/../r/attempt-1",
        "/",
    ],
)
def test_only_an_attempts_own_folder_is_one(folder: str) -> None:
    with pytest.raises(WireError):
        attempt_at(folder)


def test_an_attempts_folder_tells_its_run() -> None:
    layout, run_id, number = attempt_at("/a b/runs/run-1/attempt-12")
    assert (layout.root, run_id, number) == ("/a b", "run-1", 12)


# calls


def test_another_protocol_is_refused_with_both_versions() -> None:
    error = answer({"verb": "hello", "protocol": PROTOCOL_VERSION + 1, "params": {}})["error"]
    assert error["kind"] == "usage"
    assert f"protocol {PROTOCOL_VERSION + 1}" in error["message"]
    assert f"agent {PROTOCOL_VERSION}" in error["message"]


def test_a_hello_that_comes_along_goes_first_and_tells_the_verb_its_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = {"protocol": PROTOCOL_VERSION, "verb": "locate", "params": {"root": "~/new", "path": "/nowhere"}}
    assert "new" in answer(asked)["error"]["message"]
    reply = answer({**asked, "hello": {"root": "~/new"}})
    assert reply["hello"]["root"] == str(tmp_path / "new")
    assert reply["ok"]["how"] == "nowhere"
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / "file").touch()
    refused = answer({**asked, "hello": {"root": str(foreign)}})
    assert (refused["error"]["kind"], set(refused)) == ("unfit", {"error"})


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        ({"verb": "dance"}, "usage", "no verb 'dance'"),
        ({"verb": "hello", "params": {}}, "usage", "HelloRequest.root: missing"),
        ({"verb": "hello", "params": {"root": 7}}, "usage", "expected str"),
        ({"verb": "hello", "params": []}, "usage", "expected an object"),
        ({"verb": "status", "params": {"root": "/", "run_id": "../etc", "attempt": 1}}, "unfit", "lacks"),
        ({"verb": "inspect", "params": {"path": "relative"}}, "usage", "no absolute path"),
        ({"verb": "inspect", "params": {"path": "/nowhere/at/all.pt"}}, "usage", "nowhere"),
    ],
)
def test_what_cannot_be_done_is_a_failure_with_its_kind(request_: dict[str, Any], kind: str, words: str) -> None:
    error = answer({"protocol": PROTOCOL_VERSION, **request_})["error"]
    assert error["kind"] == kind
    assert words in error["message"]


def test_a_run_id_that_leads_elsewhere_is_refused(node: NodeLayout) -> None:
    for verb in ("status", "manifest", "launch", "void", "cancel"):
        params = {"root": node.root, "run_id": "../../etc", "attempt": 1, "nonce": "0" * 32}
        reply = answer({"protocol": PROTOCOL_VERSION, "verb": verb, "params": params})
        assert reply["error"]["kind"] == "usage", reply


# locate


def test_a_file_in_place_is_told_without_being_read(node: NodeLayout, tmp_path: Path) -> None:
    odd = tmp_path / "a $HOME $(b)\n'c' \"d\" ~ é.pt"
    odd.write_bytes(b"x")
    assert locate(LocateRequest(node.root, path=str(odd))).path == str(odd)
    plain = tmp_path / "plain.pt"
    plain.write_bytes(b"x" * 100)
    (tmp_path / "best.pt").symlink_to(plain)
    found = locate(LocateRequest(node.root, path=str(tmp_path / "best.pt")))
    assert (found.how, found.size, found.inode, found.digest) == ("in_place", 100, plain.stat().st_ino, None)
    relative = locate(LocateRequest(node.root, path="plain.pt", search_roots=(str(tmp_path),)))
    assert relative.path == str(plain)


def test_a_folder_in_place_is_told_by_its_files(node: NodeLayout, tmp_path: Path) -> None:
    folder = tmp_path / "step 7"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.distcp").write_bytes(b"x" * 100)
    (folder / "deeper" / "b.distcp").write_bytes(b"x" * 11)

    def seen() -> tuple[int | None, int | None, int | None]:
        found = locate(LocateRequest(node.root, path="step 7", search_roots=(str(tmp_path),)))
        assert (found.how, found.path, found.digest) == ("in_place", str(folder), None)
        return found.size, found.mtime_ns, found.inode

    first = seen()
    assert first == seen()
    assert first[0] == 111
    os.utime(folder / "a.distcp", ns=(1, 1))
    touched = seen()
    (folder / "deeper" / "b.distcp").rename(folder / "deeper" / "c.distcp")
    assert len({first, touched, seen()}) == 3


def test_what_is_no_readable_file_is_refused(node: NodeLayout, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused("usage", "no regular file"):
        locate(LocateRequest(node.root, path=str(tmp_path / "pipe")))
    assert locate(LocateRequest(node.root, path=str(tmp_path / "absent"))).how == "nowhere"


def test_a_part_is_never_told_to_be_the_checkpoint(node: NodeLayout, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"x" * 1000)
    digest = digest_of(content)
    part = Path(node.checkpoint_part(digest))
    part.parent.mkdir(parents=True)
    content.rename(part)  # complete by chance, and yet not finished
    Path(node.checkpoint_readable(digest)).write_text("{}")
    (tmp_path / "link").symlink_to(part)
    for path in (part, tmp_path / "link"):
        with refused("usage", "has not arrived in full"):
            locate(LocateRequest(node.root, path=str(path)))
    assert not locate(LocateRequest(node.root, path=node.checkpoint(digest))).found
    request = LocateRequest(node.root, digest=digest, size=1000, search_roots=(node.root,))
    assert not locate(request).found


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return digest_file(file, path.stat().st_size).digest


def by_content(node: NodeLayout, path: Path, *roots: Path, **changes: Any) -> LocateRequest:
    return LocateRequest(
        node.root, digest=digest_of(path), size=path.stat().st_size, search_roots=tuple(map(str, roots)), **changes
    )


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_copy_is_found_by_content_and_its_digest_remembered_until_it_is_written_to(
    node: NodeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_time: bool
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", 0.0)
    original = tmp_path / "original.pt"
    original.write_bytes(os.urandom(300_000))
    data = tmp_path / "data"
    (data / "deep" / "er").mkdir(parents=True)
    (data / "decoy.pt").write_bytes(os.urandom(300_000))
    os.mkfifo(data / "pipe")
    copy = data / "deep" / "er" / "copy.pt"
    copy.write_bytes(original.read_bytes())
    found = locate(by_content(node, original, data))
    assert (found.how, found.path) == ("by_content", str(copy))
    assert locate(LocateRequest(node.root, path=str(copy))).digest == digest_of(original)
    before = copy.stat()
    copy.write_bytes(b"changed" + copy.read_bytes()[7:])
    if keeps_time:
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert locate(LocateRequest(node.root, path=str(copy))).digest is None
    assert not locate(by_content(node, original, data)).found


def test_a_sample_that_differs_spares_the_reading(node: NodeLayout, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    copy = data / "copy.pt"
    copy.write_bytes(b"a" * 1000)
    right, wrong = hashlib.sha256(b"a" * 10).hexdigest(), hashlib.sha256(b"b" * 10).hexdigest()
    assert locate(by_content(node, copy, data, sample=((0, 10, right), (990, 10, right)))).found
    assert not locate(by_content(node, copy, data, sample=((0, 10, right), (5, 10, wrong)))).found
    for span in ((0, -1, right), ("0", 10, right), (0, 10), (0, 2**40, right)):
        with refused("usage", "sample span"):
            locate(by_content(node, copy, data, sample=(span,)))


def test_a_search_ends_when_its_time_is_up(node: NodeLayout, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt"
    copy.write_bytes(b"a" * 1000)
    assert not locate(by_content(node, copy, tmp_path, time_limit_s=0.0)).found


def test_a_search_follows_no_circle_of_links(node: NodeLayout, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "loop").symlink_to(data)
    copy = data / "copy.pt"
    copy.write_bytes(b"a" * 1000)
    assert locate(by_content(node, copy, data)).path == str(copy)
    copy.unlink()
    original = tmp_path / "o"
    original.write_bytes(b"a" * 1000)
    assert not locate(by_content(node, original, data)).found


def test_a_stored_file_is_found_and_counts_as_used(node: NodeLayout, tmp_path: Path) -> None:
    original = tmp_path / "o"
    original.write_bytes(b"a" * 1000)
    with original.open("rb") as file:
        manifest = digest_file(file, 1000)
    stored = upload_file(ThreadOpener(Path(node.root)), original, manifest).path_on_node
    uses = Path(node.checkpoint_uses(manifest.digest))
    uses.unlink()
    found = locate(by_content(node, original))
    assert (found.how, found.path) == ("store", stored)
    assert uses.exists()


# unpack_code


def tar_of(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> UnpackRequest:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path = tmp_path / "code.tar"
    path.write_bytes(buffer.getvalue())
    return UnpackRequest(str(tmp_path / "root"), str(path), hashlib.sha256(buffer.getvalue()).hexdigest())


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o4755
    return info


def test_code_is_unpacked_once_into_its_own_folder(node: NodeLayout, tmp_path: Path) -> None:
    request = tar_of(tmp_path, (member("a/b.py"), b"x = 1\n"), (member("odd näme"), b""))
    folder = Path(unpack_code(request).folder)
    assert folder == Path(node.code_folder(request.sha256))
    assert (folder / "a" / "b.py").read_bytes() == b"x = 1\n"
    assert stat.S_IMODE((folder / "a" / "b.py").stat().st_mode) == 0o700
    Path(request.archive_path).unlink()
    assert unpack_code(request).folder == str(folder)


@pytest.mark.parametrize(
    "hostile",
    [
        member("../escape"),
        member("/etc/escape"),
        member("a/../../escape"),
        member("a//b"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.LNKTYPE, "a.py"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
        member("x" * 600),
    ],
    ids=lambda info: f"{info.name[:12]}-{info.type.decode()}",
)
def test_a_hostile_archive_leaves_nothing_behind(node: NodeLayout, tmp_path: Path, hostile: tarfile.TarInfo) -> None:
    request = tar_of(tmp_path, (member("a.py"), b"x"), (hostile, b""))
    with refused("integrity", "the code archive holds"):
        unpack_code(request)
    assert list(Path(node.code).iterdir()) == []
    assert not (tmp_path / "escape").exists()


def test_a_link_first_and_a_file_through_it_does_not_escape(node: NodeLayout, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    request = tar_of(tmp_path, (member("d", tarfile.SYMTYPE, str(outside)), b""), (member("d/x.py"), b"x"))
    with refused("integrity", "no plain file"):
        unpack_code(request)
    assert list(outside.iterdir()) == []


def test_an_archive_that_is_not_what_its_digest_says_is_refused(node: NodeLayout, tmp_path: Path) -> None:
    request = tar_of(tmp_path, (member("a.py"), b"x"))
    Path(request.archive_path).write_bytes(Path(request.archive_path).read_bytes() + b"\0")
    with refused("integrity", "not what its digest says"):
        unpack_code(request)


def test_a_cut_archive_is_refused_as_damaged(node: NodeLayout, tmp_path: Path) -> None:
    whole = Path(tar_of(tmp_path, (member("a.py"), b"x" * 5000)).archive_path).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:3000])
    with refused("integrity", "damaged|holds"):
        unpack_code(UnpackRequest(node.root, str(cut), hashlib.sha256(whole[:3000]).hexdigest()))
    assert list(Path(node.code).iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_table_is_there_and_knows_its_request(verb: str) -> None:
    with pytest.raises(WireError, match=": missing"):
        perform(verb, {})


@pytest.mark.parametrize(("verb", "params"), [("hello", {}), ("locate", {"digest": f"v1:{'0' * 64}", "size": 1})])
def test_a_verb_imports_nothing_that_only_others_need(node: NodeLayout, verb: str, params: dict[str, Any]) -> None:
    """Every call is a process of its own, and its imports are most of what it takes."""
    program = (
        "import sys; from remote_payload.agent.verbs import perform\n"
        f"perform({verb!r}, {params | {'root': node.root}!r})\n"
        "others = ('tarfile', 'zipfile', 'wire.plan', 'wire.run_messages', 'agent.gc', 'agent.preflight')\n"
        "print([m for m in sys.modules if m.endswith(others)])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_agent_of_a_stream_imports_nothing_that_only_runs_need() -> None:
    program = (
        "import sys, remote_payload.agent.streams\n"
        "others = ('zipfile', 'platform', 'wire.plan', 'wire.states', 'wire.messages')\n"
        "print([m for m in sys.modules if m.endswith(others)])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
