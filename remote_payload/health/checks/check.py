"""What a check is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Callable

from remote_payload.health.facts import HealthFacts
from remote_payload.wire.results import Dimension, Finding


@dataclasses.dataclass(frozen=True)
class Check:
    """One question to the facts. `tests` says in a phrase what it looks at, for the verdict's reasons.

    `applies` tells whether the facts can answer it. `can_pass` is False for a check whose silence proves too little to
    pass its dimension: it can only find fault.
    """

    dimension: Dimension
    tests: str
    run: Callable[[HealthFacts], Iterable[Finding]]
    applies: Callable[[HealthFacts], bool] = lambda _: True
    can_pass: bool = True
    why_not: Callable[[HealthFacts], str] = lambda _: ""
    """What is missing where `applies` is false, for the verdict's reasons; empty where it goes without saying."""


def has_statistics(facts: HealthFacts) -> bool:
    """At least one tensor was measured."""
    return bool(facts.scan.stats)
