"""The report in a real browser: laid out, pictures decoded, nothing executed, nothing fetched."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.layout import RunLayout
from orchestrator.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATHS = ("/usr/bin/chromium",)
LIMIT_S = 90
RED, BLUE = (255, 0, 0), (0, 0, 255)


def browser() -> str:
    found = next((p for p in PATHS if Path(p).is_file()), None) or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("no Chromium here to look at the report with: apt-get install chromium")
    return found


def headless(profile: Path, *arguments: str) -> str:
    """Run Chromium once, bounded, with a profile of its own; returns what it printed."""
    argv = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        *arguments,
    ]
    done = subprocess.run(argv, capture_output=True, timeout=LIMIT_S, check=True)
    return done.stdout.decode()


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(colour) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(path: Path) -> tuple[int, int, list[bytes]]:
    """Width, height and the RGB rows of a screenshot (8 bits, RGB or RGBA, not interlaced)."""
    data = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour in (2, 6)) == (8, True)
    size = 3 if colour == 2 else 4
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = zlib.decompress(packed), width * size
    rows, before = [], bytes(stride)
    for y in range(height):
        line = _unfilter(raw[y * (stride + 1)], raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)], before, size)
        rows.append(b"".join(line[x : x + 3] for x in range(0, stride, size)))
        before = line
    return width, height, rows


def _unfilter(kind: int, line: bytes, before: bytes, size: int) -> bytes:
    out = bytearray(line)
    for x in range(len(out)):
        left, up = (out[x - size] if x >= size else 0), before[x]
        corner = before[x - size] if x >= size else 0
        if kind == 1:
            out[x] = (out[x] + left) & 255
        elif kind == 2:
            out[x] = (out[x] + up) & 255
        elif kind == 3:
            out[x] = (out[x] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda v: abs(guess - v))
            out[x] = (out[x] + nearest) & 255
    return bytes(out)


def share(rows: list[bytes], colour: tuple[int, int, int]) -> float:
    wanted = bytes(colour)
    hits = sum(row[x : x + 3] == wanted for row in rows for x in range(0, len(row), 3))
    return hits / (len(rows) * len(rows[0]) / 3)


class Listener(http.server.ThreadingHTTPServer):
    """Notes whoever asks for anything."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.asked: list[str] = []


class _Asked(http.server.BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def make_run(folder: Path, words: str) -> RunLayout:
    """A collected run with a red and a blue picture and `words` wherever a node may write."""
    run = RunLayout(folder)
    (run.artifacts / "reconstruct").mkdir(parents=True)
    run.diagnostics.mkdir()
    pictures = []
    for name, colour in (("red", RED), ("blue", BLUE)):
        (run.artifacts / "reconstruct" / f"{name}.png").write_bytes(png(200, 120, colour))
        pictures.append(
            {"path": f"reconstruct/{name}.png", "kind": "image", "title": words, "caption": words, "sample": 0}
        )
    document = {
        "findings": [
            {"id": "values.nan", "severity": "error", "title": words, "dimension": "numerics", "evidence": {words: 1}}
        ],
        "verdict": {"dimensions": {"integrity": "pass", "numerics": "fail"}, "reasons": {"numerics": words}},
        "metrics": [{"id": words, "value": 0.4, "chance": 0.1, "interval": [0.3, 0.5], "direction": "higher"}],
        "pictures": pictures,
        "headline": words,
    }
    run.job_results("reconstruct").write_text(json.dumps(document))
    plan = {"cluster": "c", "checkpoint": {"path": words, "cluster": "c"}, "jobs": [{"name": "reconstruct"}]}
    run.plan.write_text(json.dumps(plan))
    status = {
        "run_id": run.run_id,
        "attempt": 1,
        "nonce": "0" * 32,
        "state": "succeeded",
        "supervisor": {"pid": 1, "start_time": "1", "boot_id": "b", "machine_id": "m"},
        "jobs": {"reconstruct": {"state": "succeeded"}},
    }
    (run.diagnostics / "status.json").write_text(json.dumps(status))
    write_report(run)
    return run


def test_nothing_in_a_report_runs_or_fetches_even_when_escaping_is_undone(tmp_path: Path, listener: Listener) -> None:
    """The policy is the second wall: it must hold for markup that got past the first."""
    port = listener.server_address[1]
    attack = (
        f"<script>document.title='owned'</script><img src='http://127.0.0.1:{port}/img' "
        f"onerror=\"document.title='owned'\"><style>body{{background:url(http://127.0.0.1:{port}/css)}}</style>"
        f"<iframe src='http://127.0.0.1:{port}/frame'></iframe><svg onload=\"document.title='owned'\"></svg>"
    )
    run = make_run(tmp_path / "r1", attack)
    text = run.report_html.read_text(encoding="utf-8")
    start, end = text.index("<body>"), text.index("</body>")
    torn = text[:start] + "<body>" + attack + text[start + 6 : end] + attack + text[end:]
    (tmp_path / "torn.html").write_text(torn, encoding="utf-8")
    for page in (run.report_html, tmp_path / "torn.html"):
        dom = headless(tmp_path / page.stem, "--virtual-time-budget=3000", "--dump-dom", page.as_uri())
        title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
        assert title is not None
        assert title.group(1) != "owned"
        assert title.group(1).startswith("Not usable")
    assert listener.asked == []


def test_the_listener_would_have_noticed(tmp_path: Path, listener: Listener) -> None:
    """The same attack without our policy: else the test above proves nothing."""
    page = tmp_path / "bare.html"
    source = f"http://127.0.0.1:{listener.server_address[1]}/img"
    page.write_text(f"<title>x</title><img src='{source}'><script>document.title='owned'</script>")
    dom = headless(tmp_path / "profile", "--virtual-time-budget=3000", "--dump-dom", page.as_uri())
    assert "<title>owned</title>" in dom
    assert "/img" in listener.asked


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("mobile", 500)])
def test_the_report_is_laid_out_with_its_styles_and_pictures(tmp_path: Path, name: str, width: int) -> None:
    run = make_run(tmp_path / "r1", "some words")
    shot = tmp_path / f"{name}.png"
    headless(tmp_path / "profile", f"--window-size={width},2600", f"--screenshot={shot}", run.report_html.as_uri())
    got_width, _, rows = pixels(shot)
    assert got_width == width
    paper = (0xFA, 0xF9, 0xF6)
    assert rows[0][:3] == bytes(paper), "the stylesheet was not applied"
    assert share(rows, RED) > 0.005
    assert share(rows, BLUE) > 0.005


def test_the_report_has_a_dark_scheme(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r1", "some words")
    shot = tmp_path / "dark.png"
    dark = "--blink-settings=preferredColorScheme=0"
    headless(tmp_path / "profile", dark, "--window-size=900,700", f"--screenshot={shot}", run.report_html.as_uri())
    _, _, rows = pixels(shot)
    assert max(rows[0][:3]) < 60
    assert share(rows, (0xFA, 0xF9, 0xF6)) == 0


def test_no_page_is_wider_than_a_phone(tmp_path: Path) -> None:
    """Long names wrap or scroll within their own box: the right margin stays paper from top to bottom."""
    run = make_run(tmp_path / "r1", "encoder." + "very_long_name_without_a_break" * 12)
    shot = tmp_path / "phone.png"
    headless(tmp_path / "profile", "--window-size=500,4000", f"--screenshot={shot}", run.report_html.as_uri())
    width, _, rows = pixels(shot)
    assert width == 500
    below_navigation = rows[80:]
    paper, rule = bytes((0xFA, 0xF9, 0xF6)) * 5, bytes((0xDE, 0xDB, 0xD3)) * 5
    assert {row[-15:] for row in below_navigation} <= {paper, rule}
    assert sum(row[-15:] == rule for row in below_navigation) <= 1, "one rule, above the footer"
