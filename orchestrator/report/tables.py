"""Tables from a job's own keys: generic ones for any job, and the tensors that deserve a look for `health`. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.format import cell, cut, flatten, words
from orchestrator.report.untrusted import mapping, number, objects, text

MAX_ROWS = 40
MAX_COLUMNS = 11
MAX_TENSORS = 20
MAX_SPECTRA = 40
MAX_TABLES = 12
FP16_MAX = 65504
_COUNTERS = ("counter", "optimizer step")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table to show, with what it leaves out in `note`. Without `columns` its rows are name-value pairs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    note: str = ""


def job_tables(job: str, numbers: Mapping[str, Any], document: Mapping[str, Any]) -> list[Table]:
    """Every own key of a job's document as a table; `tensors` as the ones that stand out."""
    tables = []
    tensors = objects(document.get("tensors"))
    if tensors:
        tables.append(tensor_table(tensors))
    spectra = mapping(document.get("spectra"))
    if spectra:
        tables.append(spectrum_table(spectra))
    plain: dict[str, Any] = {}
    for key, value in numbers.items():
        if key in ("tensors", "spectra"):
            continue
        rows = objects(value)
        if rows and len(rows) == len(value):
            tables.append(object_table(words(cut(key, 80)), rows))
        elif isinstance(value, dict) and value:
            tables += dict_tables(words(cut(key, 80)), value)
        else:
            plain[key] = value
    if plain:
        tables.insert(0, pair_table(f"Other facts of {job}", plain))
    return tables[:MAX_TABLES]


def dict_tables(title: str, value: Mapping[str, Any]) -> list[Table]:
    """Objects of one shape become rows with a name, objects of different shapes a table each, all else name-value."""
    inner = [v for v in value.values() if isinstance(v, dict) and v]
    if len(inner) < len(value) or len(inner) < 2:
        return [pair_table(title, value)]
    if len({tuple(sorted(v)) for v in inner}) <= 2 and not any(isinstance(x, dict) for v in inner for x in v.values()):
        return [object_table(title, [{"name": words(cut(name, 80)), **mapping(v)} for name, v in value.items()])]
    return [t for name, v in value.items() for t in dict_tables(f"{title}: {words(cut(name, 80)).lower()}", v)]


def pair_table(title: str, value: Mapping[str, Any]) -> Table:
    """Nested names joined by dots, and their values."""
    return Table(title, (), tuple(flatten(value)), (False, False))


def object_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row an object; the columns are the keys of the first ones."""
    keys = list(dict.fromkeys(k for row in rows[:MAX_ROWS] for k in row))
    shown = keys[:MAX_COLUMNS]
    left_out = []
    if len(rows) > MAX_ROWS:
        left_out.append(f"{len(rows) - MAX_ROWS} more rows")
    if len(keys) > MAX_COLUMNS:
        left_out.append(f"columns {', '.join(keys[MAX_COLUMNS:])[:200]}")
    note = f"Not shown: {' and '.join(left_out)}; the job's document has them." if left_out else ""
    return Table(
        title,
        tuple(words(cut(k, 80)) for k in shown),
        tuple(tuple(cell(row.get(k)) for k in shown) for row in rows[:MAX_ROWS]),
        tuple(_is_numeric(rows, k) for k in shown),
        note,
    )


def tensor_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    """The tensors that stand out: those with non-finite values, then beyond fp16, constants, and the largest."""
    ranked = sorted(tensors, key=_offence, reverse=True)
    table = object_table("Tensors that stand out", [_tensor_row(t) for t in ranked[:MAX_TENSORS]])
    total = f"{min(len(tensors), MAX_TENSORS)} of {len(tensors)} tensors, the most conspicuous first."
    return dataclasses.replace(table, note=total)


def spectrum_table(spectra: Mapping[str, Any]) -> Table:
    """Weights as matrices by their spectral norm, largest first, with stable rank and the power law of the tail."""
    found = {name: mapping(facts) for name, facts in mapping(spectra.get("tensors")).items()}
    ranked = sorted(found.items(), key=lambda f: -(number(f[1].get("spectral_norm")) or 0))
    rows = [_spectrum_row(name, facts) for name, facts in ranked[:MAX_SPECTRA]]
    note = f"{len(rows)} of {len(found)} weights, the largest spectral norm first."
    if left_out := mapping(spectra.get("not_measured")):
        note += f" {len(left_out)} were not measured."
    return dataclasses.replace(object_table("Spectra of the weights", rows), note=note)


def _spectrum_row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    law = mapping(facts.get("power_law"))
    row = {
        "name": name,
        "shape": f"{cell(facts.get('rows'))} × {cell(facts.get('columns'))}",
        **{k: facts.get(k) for k in ("spectral_norm", "frobenius_norm", "stable_rank")},
        "found by": "every singular value" if facts.get("iterations") == 0 else "power iteration",
    }
    if facts.get("iterations") != 0 and facts.get("converged") is False:
        row["found by"] = "power iteration, not converged"
    return {**row, "alpha": law.get("alpha"), "alpha_error": law.get("alpha_error"), "in the tail": law.get("tail")}


def _tensor_row(tensor: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("name", "role", "shape", "dtype", "minimum", "maximum", "mean", "std", "zero_fraction", "nan", "inf")
    flat = {**tensor, **mapping(tensor.get("statistics"))}
    infinities = [number(flat.get(k)) for k in ("positive_inf", "negative_inf")]
    if any(v is not None for v in infinities):
        flat["inf"] = sum(v or 0 for v in infinities)
    row = {k: flat[k] for k in wanted if flat.get(k) is not None}
    if text(row.get("role")):
        row["role"] = row["role"].replace("_", " ")
    shape = row.get("shape")
    if isinstance(shape, list):
        row["shape"] = " × ".join(str(v) for v in shape) or "scalar"
    return row


def _offence(tensor: Mapping[str, Any]) -> tuple[float, float, float, float]:
    row = _tensor_row(tensor)
    broken = (number(row.get("nan")) or 0) + (number(row.get("inf")) or 0)
    largest = max(abs(number(row.get("minimum")) or 0), abs(number(row.get("maximum")) or 0))
    is_counter = text(row.get("role")) in _COUNTERS
    if is_counter:
        return float(broken), 0.0, 0.0, 0.0
    return float(broken), float(largest > FP16_MAX), float(number(row.get("std")) == 0), float(largest)


def _is_numeric(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [row.get(key) for row in rows[:MAX_ROWS] if row.get(key) is not None]
    return bool(values) and all(number(v) is not None for v in values)
