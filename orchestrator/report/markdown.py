"""report.md: the same verdict for terminals, wikis and pull requests. Everything that others wrote is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.layout import RunLayout
from orchestrator.report.format import bytes_text, cell, command_text, cut, flatten, number_text, seconds_text, words
from orchestrator.report.logs import log_tails
from orchestrator.report.media import UnsafeMediaError, load
from orchestrator.report.metrics_view import judge
from orchestrator.report.untrusted import mapping, number
from orchestrator.report.verdict import OUTCOME_WORDS, job_state_sentence

MAX_FINDINGS = 60
MAX_METRICS = 200
MAX_PICTURES = 200
MAX_TEXT = 1000
_ANYWHERE = re.compile(r"([\\`*_{}\[\]|~<>$&@]|:(?=//)|(?<=www)\.)")
_AT_THE_START = re.compile(r"^([-+#=](?=[-+#=\s]|$)|\d{1,9}(?=[.)](?:\s|$)))")


def escape(text: str) -> str:
    """The start of `text` on one line, with what Markdown or HTML would take for markup escaped."""
    flat = _ANYWHERE.sub(r"\\\1", " ".join(cut(text, MAX_TEXT).split()))
    return _AT_THE_START.sub(lambda m: f"\\{m[0]}" if not m[0].isdigit() else f"{m[0]}\\", flat)


def render_markdown(run: RunLayout, results: Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown; pictures are linked relative to the run's folder."""
    verdict, facts = results["verdict"], results["run"]
    lines = [
        f"# {escape(verdict['sentence'])}",
        "",
        f"Checkpoint {code(facts['checkpoint'] or 'not known')}, cluster {code(facts['cluster'] or 'not known')}, "
        f"run {code(facts['run_id'])}.",
        "",
        "| dimension | verdict | why |",
        "| --- | --- | --- |",
    ]
    for name, outcome in verdict["dimensions"].items():
        reason = escape(verdict["reasons"].get(name, ""))
        lines.append(f"| {words(name)} | **{OUTCOME_WORDS[outcome]}** | {reason} |")
    lines += _findings(results["findings"])
    lines += _metrics(results)
    lines += _pictures(run, results["pictures"])
    lines += _comparison(results["comparison"])
    lines += _jobs(results)
    lines += _logs(run, results)
    lines += _provenance(results)
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """`text` as a code span that cannot be left: one line, fenced by more backticks than it holds, safe in a table."""
    flat = " ".join(cut(text, MAX_TEXT).split()).replace("|", "¦").replace("<", "‹").replace(">", "›")
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def block(text: str) -> list[str]:
    """`text` as lines of an indented code block, which no content can end."""
    return ["", *(f"    {line}" for line in text.splitlines()), ""]


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", "## Findings", ""] if findings else []
    for finding in findings[:MAX_FINDINGS]:
        lines.append(f"- **{finding['severity']}** {code(finding['id'])} {escape(finding['title'])}")
        if finding["explanation"]:
            lines.append(f"  - {escape(finding['explanation'])}")
        if finding["evidence"]:
            evidence = "; ".join(f"{escape(k)} {escape(v)}" for k, v in flatten(finding["evidence"], limit=16))
            lines.append(f"  - Evidence: {evidence}")
        if finding["action"]:
            lines.append(f"  - What to do: {escape(finding['action'])}")
    if len(findings) > MAX_FINDINGS:
        lines.append(f"- {len(findings) - MAX_FINDINGS} more in results.json")
    return lines


def _metrics(results: Mapping[str, Any]) -> list[str]:
    said = [f"{escape(e['headline'])} ({job})" for job, e in results["jobs"].items() if e["headline"]]
    if not results["metrics"] and not said:
        return []
    lines = ["", "## Numbers", "", *(f"{s}\n" for s in said)]
    if results["metrics"]:
        lines += ["| metric | value | chance | interval | n | judgement |", "| --- | ---: | ---: | --- | ---: | --- |"]
    for metric in results["metrics"][:MAX_METRICS]:
        interval = metric["interval"]
        shown = f"{number_text(interval[0])} to {number_text(interval[1])}" if interval else "—"
        value = "not measured" if metric["value"] is None else number_text(metric["value"])
        is_plain = metric["value"] is None or metric["unit"] in (None, "1")
        unit = "" if is_plain else f" {escape(metric['unit'])}"
        name = f"{code(metric['id'])} {escape(metric['modality'] or '')}".strip()
        lines.append(
            f"| {name} | {value}{unit} | {number_text(metric['chance'])} | {shown} | {number_text(metric['n'])} "
            f"| {escape(judge(metric)[1])} |"
        )
    return lines


def _pictures(run: RunLayout, pictures: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for picture in pictures[:MAX_PICTURES]:
        try:
            load(run.artifact(picture["path"]), picture["kind"])
        except UnsafeMediaError as error:
            lines.append(f"- {code(picture['path'])} is not shown: {escape(str(error))}")
            continue
        title = escape(picture["title"] or picture["role"] or picture["path"])
        mark = "!" if picture["kind"] == "image" else ""
        caption = f" {escape(picture['caption'])}" if picture["caption"] else ""
        lines.append(f"- {mark}[{title}](artifacts/{picture['path']}){caption}")
    return ["", "## Pictures", "", *lines] if lines else []


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    if not comparison["against"]:
        return []
    changes = [f"- **{c['kind']}** {escape(c['sentence'])}" for c in comparison["changes"][:MAX_FINDINGS]]
    return [
        "",
        f"## Against run {code(comparison['against'])}",
        "",
        *(changes or ["Nothing changed beyond its tolerance."]),
    ]


def _jobs(results: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Jobs", ""] if results["jobs"] else []
    seconds = mapping(results["provenance"].get("job_seconds"))
    for name, entry in results["jobs"].items():
        took = number(seconds.get(name))
        time = f" in {seconds_text(took)}" if took is not None else ""
        said = (
            f"Job {name} succeeded{time}"
            if entry["counts"]
            else job_state_sentence(name, entry["state"], entry["error"])
        )
        lines.append(f"- {escape(said)}")
    return lines


def _logs(run: RunLayout, results: Mapping[str, Any]) -> list[str]:
    if results["attempt"]["state"] == "succeeded":
        return []
    lines: list[str] = []
    for tail in log_tails(run):
        lines += ["", f"## {tail.title}", *block(tail.text[-6000:])]
    return lines


def _provenance(results: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Provenance", "", "| what | value |", "| --- | --- |"]
    lines += [f"| {escape(k)} | {escape(v)} |" for k, v in flatten(results["provenance"], limit=80)]
    total = sum(a["size"] for a in results["artifacts"])
    lines.append(f"| artifacts | {cell(len(results['artifacts']))} files, {bytes_text(total)} |")
    command = command_text(results)
    if command:
        lines += ["", "To run it again:", *block(command)]
    if results["notes"]:
        lines += ["", "What could not be read:", "", *(f"- {escape(n)}" for n in results["notes"][:50])]
    return lines
