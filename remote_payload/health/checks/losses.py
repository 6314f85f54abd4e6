"""The parts of a loss: one that drowns the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Optional

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.health.checks.check import Check
from remote_payload.health.facts import HealthFacts
from remote_payload.health.run_config import run_config
from remote_payload.health.training_record import Series, training_record
from remote_payload.wire.results import Dimension, Finding, Severity

_REGULARISER = re.compile(
    r"(^|[._])(kl|kld|reg|regulari[sz]er|regulari[sz]ation|aux|l1|l2|wd|decay|penalty|commit|commitment|entropy|z|vq|"
    r"balance|smooth|tv|norm|sparsity|ortho)([._]|$)",
    re.IGNORECASE,
)
_TOTAL = re.compile(r"^(total|loss|train|val|valid|validation|test|epoch|mean|avg|best|_)+$", re.IGNORECASE)
_WORDS = re.compile(r"_?(loss|losses|mse|mae|recon|reconstruction|error)_?", re.IGNORECASE)
_DOMINATED = 0.95
_ADDS_UP = 0.05


def loss_parts(header: CheckpointHeader) -> list[tuple[str, dict[str, Series]]]:
    """For each history with a total loss and named parts: its name, and the parts by short name.

    Parts that merely restrain the model (regularisers) belong to the total but are small by design.
    """
    groups: dict[str, dict[str, Series]] = {}
    for series in training_record(header).series:
        history, _, leaf = series.name.rpartition(".")
        if "loss" in leaf.lower() or _WORDS.sub("", leaf) != leaf:
            groups.setdefault(history, {})[leaf] = series
    found = []
    for history, members in groups.items():
        parts = {leaf: s for leaf, s in members.items() if not _TOTAL.match(leaf)}
        if len(parts) >= 2:
            found.append((history, parts))
    # What is held out says more than what was trained on.
    return sorted(found, key=lambda entry: not next(iter(entry[1].values())).held_out)


def total_loss(header: CheckpointHeader, history: str) -> Optional[Series]:
    """The total in the same history, if one is called that."""
    for series in training_record(header).series:
        name, _, leaf = series.name.rpartition(".")
        if name == history and _TOTAL.match(leaf) and "loss" in leaf.lower():
            return series
    return None


def dominant_part(header: CheckpointHeader, history: str, parts: dict[str, Series]) -> Optional[tuple[str, float, str]]:
    """(part, its share of the loss, how it was weighted) at the end of a history, None if shares cannot be told.

    Shares are of the weighted parts where the config has weights that add up to the total, else of the parts as they
    stand, if they add up to it.
    """
    last = {leaf: s.values[-1] for leaf, s in parts.items()}
    if any(v < 0 for v in last.values()):
        return None
    total = total_loss(header, history)
    for weighting, weighted in (("weights of the config", _weighted(header, last)), ("equal weights", last)):
        amount = sum(weighted.values()) if weighted else 0.0
        if not weighted or not 0 < amount < math.inf:
            continue
        if total is not None and abs(amount - total.values[-1]) > _ADDS_UP * abs(total.values[-1]):
            continue
        part = max(weighted, key=lambda leaf: weighted[leaf])
        return part, weighted[part] / amount, weighting
    return None


def _weighted(header: CheckpointHeader, last: dict[str, float]) -> dict[str, float]:
    weights = run_config(header).numbers_named(r"weight|lambda|coef|alpha|beta|scale|video|audio|text|fmri|image")
    found = {}
    for leaf, value in last.items():
        stem = _WORDS.sub("", leaf).strip("_").lower()
        names = [n for n in weights if (stem and stem in n.split("_")) or n == stem]
        if len(names) != 1:
            return {}
        found[leaf] = weights[names[0]] * value
    return found


def _dominated(facts: HealthFacts) -> Iterator[Finding]:
    for history, parts in loss_parts(facts.header):
        kept = {leaf: s for leaf, s in parts.items() if not _REGULARISER.search(_WORDS.sub("_", leaf))}
        found = dominant_part(facts.header, history, kept) if len(kept) >= 2 else None
        if found is None or found[1] < _DOMINATED:
            continue
        part, share, weighting = found
        yield Finding(
            id="training.loss_dominated",
            severity=Severity.WARNING,
            title=f"{share:.1%} of the loss in {history[:80]} is {part[:80]}",
            dimension=Dimension.TRAINING_DYNAMICS,
            where=(kept[part].name[:200],),
            evidence={
                "share": share,
                "parts": {leaf[:80]: s.values[-1] for leaf, s in list(kept.items())[:20]},
                "weighting": weighting,
                "epochs": len(kept[part].values),
            },
            explanation="Gradients go where the loss is: the other parts together have a few percent of it, so the "
            "model is trained for this one alone, and the total says nothing about the rest. Errors of unlike "
            "quantities need dividing by their variances (not their standard deviations, which leaves the units of "
            "one of them) before they are added.",
            confidence=0.8,
            refuted_by="Weights in the loss that the file does not name.",
            action="Divide each part by the variance of its target, or weight the parts; report each by itself.",
        )
        return


CHECKS = (
    Check(
        Dimension.TRAINING_DYNAMICS,
        "the parts of the loss against each other",
        _dominated,
        lambda facts: bool(loss_parts(facts.header)),
        can_pass=False,
        why_not=lambda _: "the histories name no parts of the loss",
    ),
)
