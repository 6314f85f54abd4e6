"""The finding about globals that a checkpoint's pickle would have run."""

from __future__ import annotations

from remote_payload.checkpoint.inert import Symbol, Trust
from remote_payload.checkpoint.trust import is_dangerous
from remote_payload.wire.results import Dimension, Finding, Severity


def unsafe_global_findings(symbols: tuple[Symbol, ...]) -> tuple[Finding, ...]:
    """`security.unsafe_global`: an error if something would run, a warning if it is merely named."""
    unsafe = [s for s in symbols if s.trust is Trust.UNSAFE]
    worst = [s for s in unsafe if s.called or is_dangerous(s)]
    named = [s for s in unsafe if s not in worst]
    return tuple(
        _finding(group, severity) for group, severity in ((worst, Severity.ERROR), (named, Severity.WARNING)) if group
    )


def _finding(symbols: list[Symbol], severity: Severity) -> Finding:
    names = sorted(s.full_name[:200] for s in symbols)
    dangerous = sorted(s.full_name[:200] for s in symbols if is_dangerous(s))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    would = "calls" if severity is Severity.ERROR else "names"
    return Finding(
        id="security.unsafe_global",
        severity=severity,
        title=f"The pickle {would} {shown}",
        dimension=Dimension.INTEGRITY,
        where=tuple(names[:50]),
        evidence={
            "globals": names[:200],
            "called": sorted(s.full_name[:200] for s in symbols if s.called)[:200],
            "known_dangerous": dangerous[:200],
        },
        explanation="A loader that obeys this pickle imports and runs code that no allow-list knows. Nothing of it was "
        "imported or run here; the objects it asks for are treated as opaque.",
        confidence=1.0 if dangerous else 0.9,
        refuted_by="The source of every global named, trusted and reviewed by whoever loads the file.",
        action="Do not load this file with torch.load(weights_only=False). Save the state dict alone, or convert the "
        "file to safetensors on a machine that trusts it. `checkpoint --allow-list` prints what is harmless.",
    )
