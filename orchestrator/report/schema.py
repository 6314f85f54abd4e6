"""The published JSON Schema of results.json."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def results_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the results.json that this version writes."""
    text = resources.files("orchestrator.report").joinpath("results.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
