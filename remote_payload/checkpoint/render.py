"""The header as a page of plain text for a terminal."""

from __future__ import annotations

from typing import Any

from remote_payload.checkpoint.header import CheckpointHeader, OptimizerFacts
from remote_payload.wire.names import printable
from remote_payload.wire.results import Finding

_CLASS_LABELS = (
    ("batchnorm_layers", "BatchNorm layers"),
    ("weight_matrices", "weight matrices"),
    ("embeddings", "embeddings"),
    ("norm_scales", "norm scales (gamma)"),
    ("bias_entries", "biases, norm shifts included"),
    ("norm_shifts", "of these norm shifts (beta)"),
    ("running_statistics", "running statistics"),
    ("counters", "counters"),
    ("other", "other"),
)
_MAX_SHOWN = 40
_MAX_TEXT = 200


def render_header(header: CheckpointHeader, findings: list[Finding]) -> str:
    """Facts, classes with counts, findings and notes. Whatever the file wrote is made printable."""
    sections = [
        _table("Checkpoint", _facts(header)),
        _table("State dict", [(label, f"{header.class_counts[key]:,}") for key, label in _CLASS_LABELS]),
        _table("Optimizer", _optimizer_facts(header)),
        _table("Values", _rows(header.scalars)),
        _table("Config", _rows(header.config)),
        _table("Histories", [(name, _history_size(value)) for name, value in header.histories.items()]),
        _list("Findings", [f"{f.severity.value}: {f.id}: {f.title}" for f in findings]),
        _list("Notes", list(header.notes)),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def _facts(header: CheckpointHeader) -> list[tuple[str, str]]:
    records = header.record_summary()
    place = header.state_path or "(the root)"
    facts = [
        ("file", header.path),
        ("format", header.format + (f", version {header.format_version}" if header.format_version else "")),
        ("size", human_bytes(header.size_bytes)),
        ("state dict", place + (" (guessed)" if header.state_guessed else "")),
        ("entries", f"{header.entry_count:,}"),
        ("parameters", f"{header.parameter_count:,}"),
        ("types", ", ".join(f"{n} {dtype}" for dtype, n in sorted(header.dtypes.items(), key=lambda p: -p[1]))),
        ("model bytes", human_bytes(header.bytes.model)),
    ]
    for label, count in (
        ("optimizer bytes", header.bytes.optimizer),
        ("averaged weights", header.bytes.average),
        ("other tensors", header.bytes.other),
    ):
        if count:
            facts.append((label, human_bytes(count)))
    facts.append(("records", f"{records.count:,}, {records.with_checksum:,} with a checksum"))
    if header.removed_prefixes:
        facts.append(("prefixes removed", ", ".join(header.removed_prefixes)))
    return facts


def _optimizer_facts(header: CheckpointHeader) -> list[tuple[str, str]]:
    several = len(header.optimizers) > 1
    return [fact for o in header.optimizers for fact in ([("at", o.path)] if several else []) + _facts_of(o)]


def _facts_of(optimizer: OptimizerFacts) -> list[tuple[str, str]]:
    facts = [
        ("kind", optimizer.kind),
        ("parameters", f"{optimizer.parameter_count:,}, {optimizer.state_count:,} with state"),
        ("matched to names", optimizer.mapping.replace("_", " ")),
    ]
    if optimizer.steps:
        facts.append(("steps", ", ".join(str(s) for s in optimizer.steps[:8])))
    for index, group in enumerate(optimizer.groups[:4]):
        shown = {
            k: v for k, v in group.items() if k in ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")
        }
        facts.append((f"group {index}", ", ".join(f"{k} {v}" for k, v in shown.items())))
    return facts


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(value)) for name, value in list(values.items())[:_MAX_SHOWN]]
    if len(values) > _MAX_SHOWN:
        rows.append(("…", f"{len(values) - _MAX_SHOWN} more"))
    return rows


def _history_size(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{len(value)} {'entries' if isinstance(value, list) else 'series'}"
    return str(value)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    clean = [(_one_line(label)[:40], _one_line(value)) for label, value in rows]
    width = max(len(label) for label, _ in clean)
    return "\n".join([title, *(f"  {label.ljust(width)}  {value}" for label, value in clean)])


def _list(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {_one_line(line, 400)}" for line in lines)]) if lines else ""


def _one_line(text: str, limit: int = _MAX_TEXT) -> str:
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= limit else line[:limit] + "…"


def human_bytes(count: int) -> str:
    """`21,001,234,567 bytes (19.6 GiB)`."""
    amount, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    exact = f"{count:,} bytes"
    return exact if unit == "bytes" else f"{exact} ({amount:.1f} {unit})"
