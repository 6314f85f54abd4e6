"""report.html: one file without scripts, fonts or links to anywhere, in which everything that others wrote is text."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from orchestrator.layout import RunLayout
from orchestrator.report.logs import log_tails
from orchestrator.report.pictures import gallery
from orchestrator.report.view import page

MAX_REPORT_BYTES = 10_000_000
_PICTURE_BUDGET = 8_500_000
"""Characters of `data:` URIs; what is left of the report's limit is ample for its text, which is bounded."""


def render_html(run: RunLayout, results: Mapping[str, Any], documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, below `MAX_REPORT_BYTES`: pictures that would not fit are left out, and the page says which.

    `documents` are the jobs' own documents, for the tables of what results.json does not repeat.
    """
    styles = stylesheet()
    shown = page(results, documents)
    logs = log_tails(run) if results["attempt"]["state"] != "succeeded" else []
    budget = _PICTURE_BUDGET
    while True:
        text = _template().render(
            styles=Markup(styles),  # noqa: S704 - our own file, nothing from a node
            policy=content_security_policy(styles),
            gallery=gallery(run, results["pictures"], budget),
            logs=logs,
            **shown,
        )
        excess = len(text.encode()) - MAX_REPORT_BYTES
        if excess < 0 or (budget <= 0 and not shown["tables"]):
            return text
        if budget <= 0:
            # Only documents made to be huge get here: every table is bounded, their number is the job's.
            shown |= {"tables": [], "notes": [*shown["notes"], "The jobs' tables are too long for this report."]}
        budget -= excess + 1


def content_security_policy(styles: str) -> str:
    """No script, no network, no frame, no form; only these styles, and pictures and sounds inside the file."""
    digest = base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def stylesheet() -> str:
    """The page's styles, with classes for positions in percent: the policy forbids style attributes."""
    written = resources.files("orchestrator.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    steps = range(101)
    positions = "".join(f".x{p}{{left:{p}%}}.w{p}{{width:{p}%}}.h{p}{{height:{p}%}}" for p in steps)
    return f"\n{written}{positions}\n"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
