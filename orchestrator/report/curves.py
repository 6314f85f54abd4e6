"""The training histories that a checkpoint carries, as small charts. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.format import cut, number_text, words
from orchestrator.report.untrusted import mapping, number, objects

MAX_CURVES = 8
MAX_POINTS = 60


@dataclasses.dataclass(frozen=True)
class Curve:
    """One quantity over epochs: heights in percent of its range (None: no number there), its lowest and last marked."""

    title: str
    heights: tuple[int | None, ...]
    lowest_at: int
    summary: str


def history_curves(numbers: Mapping[str, Any]) -> list[Curve]:
    """Charts of `header.histories` (name → one object an epoch): losses first, then the other quantities."""
    histories = mapping(mapping(numbers.get("header")).get("histories"))
    series: list[tuple[bool, str, list[float | None]]] = []
    for name, value in histories.items():
        entries = objects(value)
        for key in dict.fromkeys(k for entry in entries for k in entry):
            values = [_number(entry.get(key)) for entry in entries]
            if sum(v is not None for v in values) >= 2:
                series.append(("loss" not in key, f"{_split(name)}: {words(cut(key, 60)).lower()}", values))
    ordered = sorted(series, key=lambda s: s[0])
    return [_curve(title, values) for _, title, values in ordered[:MAX_CURVES]]


def _curve(title: str, values: Sequence[float | None]) -> Curve:
    known = [(v, i) for i, v in enumerate(values) if v is not None]
    low, low_at = min(known)
    high, _ = max(known)
    last, _ = known[-1]
    step = max(1, -(-len(values) // MAX_POINTS))
    kept = sorted({*range(0, len(values), step), low_at, len(values) - 1})
    span = (high - low) or 1.0
    heights = tuple(None if (v := values[i]) is None else 4 + round(96 * (v - low) / span) for i in kept)
    summary = f"{len(values)} entries; lowest {number_text(low)} at entry {low_at + 1}; last {number_text(last)}"
    return Curve(title, heights, kept.index(low_at), summary)


def _number(value: Any) -> float | None:
    """A float of moderate size: spans of differences must stay finite."""
    given = number(value)
    return float(given) if given is not None and abs(given) < 1e300 else None


def _split(name: str) -> str:
    return words(cut(name, 60).replace("_history", ""))
