"""report.html and report.md: self-contained, escaped, bounded, and about what matters."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from report_run_maker import document, finding, make_run, metric, png, wav

from orchestrator.history import row_from_results
from orchestrator.layout import RunLayout
from orchestrator.report import build_results, write_report
from orchestrator.report.html import MAX_REPORT_BYTES
from orchestrator.report.markdown import code, escape

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`|[x](javascript:alert(3)){{7*7}}\x1b[31m\u202e"
MARKDOWN_TAGS = {
    "h1",
    "h2",
    "p",
    "ul",
    "li",
    "strong",
    "code",
    "pre",
    "a",
    "img",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that do not pair up."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def full_run(folder: Path, words: str = "plain") -> RunLayout:
    pictures = [
        {"path": "reconstruct/p/a.png", "kind": "image", "title": words, "caption": words, "sample": 0, "role": words},
        {"path": "reconstruct/p/a.wav", "kind": "audio", "title": words, "sample": words, "modality": words},
        {"path": "reconstruct/p/evil.svg", "kind": "image", "title": words},
    ]
    health = document(
        "health",
        {"integrity": "pass", "numerics": "fail"},
        findings=[finding(title=words, where=[words], evidence={words: words}, explanation=words, action=words)],
        headline=words,
        tensors=[{"name": words, "role": words, "shape": [2, 3], "statistics": {"std": 0.5, "maximum": 2}}],
        header={words: words, "entries": 162},
        classes={"bias": {"count": 48}, "norm": {"count": 22}},
        rows=[{words: words, "n": 2}],
    )
    health["verdict"]["reasons"]["numerics"] = words
    numbers = [
        metric(interval=[0.1, 0.3], parameters={words: words}, baselines={words: 0.1}, modality=words, unit=words),
        metric(words, None, reason=words),
    ]
    run = make_run(
        folder,
        {"health": health, "reconstruct": document("reconstruct", metrics=numbers, pictures=pictures, headline=words)},
        states={"reconstruct": {"state": "failed", "error": words, "phase": "run", "counter": 3, "total": 9}},
        attempt_state="failed",
        files={
            "reconstruct/p/a.png": png(),
            "reconstruct/p/a.wav": wav(),
            "reconstruct/p/evil.svg": b"<svg onload=alert(1)></svg>",
        },
        provenance={words: words},
        plan_over={"checkpoint": {"path": words, "cluster": None}, "config_path": words},
        status_over={"cause": words},
    )
    (run.diagnostics / "stderr.log").write_text(f"Traceback\n{words}\n</pre>", encoding="utf-8")
    return run


def test_nothing_that_a_node_wrote_becomes_markup(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1", EVIL)
    earlier = row_from_results(build_results(run)).__class__.from_json(
        row_from_results(build_results(run)).to_json() | {"run_id": EVIL, "sentence": EVIL}
    )
    write_report(run, [earlier])
    text = run.report_html.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "svg", "iframe", "object", "embed", "link", "form", "base"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on") or a == "style"], tag
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;", "data:audio/wav;")), value
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{7*7}}" in text
    assert "alert(1)" in page.text


def test_the_policy_names_the_hash_of_the_styles_and_allows_no_script(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1")
    write_report(run)
    text = run.report_html.read_text(encoding="utf-8")
    policy = next(a["content"] for t, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(styles) == 1
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    assert policy is not None
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert "script" not in policy
    assert "unsafe" not in policy


def test_the_report_speaks_of_the_failure_and_shows_its_logs_harmlessly(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1", EVIL)
    write_report(run)
    page = Page(run.report_html.read_text(encoding="utf-8"))
    assert "Not usable" in page.text
    assert "Job reconstruct failed" in page.text
    assert "\\x1b[31m\\x202e" in page.text
    assert "evil.svg: the file is none of PNG, JPEG, WebP and WAV" in page.text


def test_each_picture_has_words_for_those_who_cannot_see_it(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1")
    write_report(run)
    page = Page(run.report_html.read_text(encoding="utf-8"))
    assert [a["alt"] for t, a in page.tags if t == "img"] == ["plain, plain, sample 0"]
    assert all(a["aria-label"] for t, a in page.tags if t == "audio")
    headings = [t for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def noise_png(side: int, seed: int) -> bytes:
    """A picture that does not compress."""
    rows = b"".join(
        b"\0" + b"".join(hashlib.sha256(struct.pack(">III", seed, y, x)).digest() for x in range(side // 32))
        for y in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


def test_a_report_stays_below_its_limit_and_names_what_it_left_out(tmp_path: Path) -> None:
    count = 12
    big = noise_png(1024, 1)
    files = {f"reconstruct/p/{i}.png": big for i in range(count)}
    pictures = [{"path": path, "kind": "image", "title": path} for path in files]
    run = make_run(tmp_path / "r1", {"reconstruct": document("reconstruct", pictures=pictures)}, files=files)
    write_report(run)
    text = run.report_html.read_text(encoding="utf-8")
    shown = text.count("<img ")
    assert len(text.encode()) < MAX_REPORT_BYTES
    assert 0 < shown < count
    assert text.count("left out to keep this report small") == count - shown
    assert f"{count - shown} picture" in text


def test_endless_texts_and_tables_do_not_make_an_endless_report(tmp_path: Path) -> None:
    long = "'" * 4000
    many = [finding(title=long, explanation=long, where=[long] * 12, evidence={f"{i}{long}": long for i in range(3)})]
    tables = {f"key{i}": [{f"c{j}": "'" * 150 for j in range(9)}] * 40 for i in range(40)}
    baselines = {f"{i}{long}": 1.0 for i in range(5)}
    numbers = [metric(long, 0.5, modality=long, unit=long, parameters={long: long}, baselines=baselines)]
    pictures = [{"path": f"health/{i}.png", "kind": "image", "title": long, "caption": long} for i in range(50)]
    huge = document("health", findings=many * 300, metrics=numbers * 300, headline=long, pictures=pictures, **tables)
    run = make_run(
        tmp_path / "r1",
        {"health": huge},
        states={"health": {"state": "failed", "error": long}},
        attempt_state="failed",
        files={p["path"]: noise_png(512, 1) for p in pictures},
        status_over={"cause": long},
    )
    for name in ("stdout.log", "stderr.log", "stacks.log"):
        (run.diagnostics / name).write_text(long * 100)
    write_report(run)
    assert "150 more findings are in results.json" in run.report_html.read_text(encoding="utf-8")
    assert run.report_html.stat().st_size < MAX_REPORT_BYTES
    assert run.report_markdown.stat().st_size < MAX_REPORT_BYTES


@pytest.mark.parametrize("documents", [{}, {"health": {}}, {"health": document("health")}])
def test_a_run_that_has_little_still_gets_its_three_documents(tmp_path: Path, documents: dict) -> None:
    run = make_run(tmp_path / "r1", documents)
    results = write_report(run)
    assert json.loads(run.results.read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert Page(run.report_html.read_text(encoding="utf-8")).text.count("No verdict") >= 1
    assert run.report_markdown.read_text(encoding="utf-8").startswith("# No verdict")
    assert not list(run.folder.glob(".*"))


def test_writing_a_report_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1")
    write_report(run)
    first = [p.read_bytes() for p in (run.report_html, run.report_markdown, run.results)]
    write_report(run)
    assert [p.read_bytes() for p in (run.report_html, run.report_markdown, run.results)] == first


def test_markdown_holds_no_markup_of_a_nodes_making(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r1", EVIL)
    write_report(run)
    text = run.report_markdown.read_text(encoding="utf-8")
    page = Page(MarkdownIt("commonmark").enable("table").render(text))
    assert {t for t, _ in page.tags} <= MARKDOWN_TAGS
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "artifacts/").startswith("artifacts/")
    assert "\x1b" not in text
    assert "](artifacts/reconstruct/p/a.png)" in text
    assert "evil.svg)" not in text


@pytest.mark.parametrize("text", ["`", "``", "a`b``c", "`a", "a|b", "<b>", "two\nlines", "&lt;"])
def test_a_code_span_cannot_be_left(text: str) -> None:
    span = code(text)
    fence = re.match(r"`+", span)
    assert fence is not None
    inner = span[len(fence.group()) : -len(fence.group())]
    assert fence.group() not in re.findall(r"`+", inner)
    assert "\n" not in span
    assert "|" not in span
    assert "<" not in span


def test_escaped_text_has_no_live_character() -> None:
    assert escape("*a*\n# b: 0.5 (x)") == "\\*a\\* # b: 0.5 (x)"
    assert escape("<b>&amp;") == "\\<b\\>\\&amp;"
    assert [escape(t) for t in ("1.5", "-0.5", "=a", "#5")] == ["1.5", "-0.5", "=a", "#5"]
    assert [escape(t) for t in ("# a", "- a", "1. a", "2) a", "=== a")] == [
        "\\# a",
        "\\- a",
        "1\\. a",
        "2\\) a",
        "\\=== a",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "# a",
        "- a",
        "+ a",
        "12. a",
        "3) a",
        "===",
        "> a",
        "    a",
        "---",
        "-",
        "=",
        "- - -",
        "7.",
        "~~~",
        "a | b",
        "![a](b)",
    ],
)
def test_text_at_the_start_of_a_line_stays_text(text: str) -> None:
    page = Page(MarkdownIt("commonmark").enable("table").enable("strikethrough").render(f"a\n\n{escape(text)}\n"))
    assert [t for t, _ in page.tags] == ["p", "p"]
    assert page.text == f"a {' '.join(text.split())}"
