"""One visit to every target: evaluate what is new, say what stands, and never let one target stop another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from orchestrator.errors import ExitCode, RemoteEvalError
from orchestrator.fsutil import exclusive_lock
from orchestrator.layout import LocalLayout
from orchestrator.nightly.state import Evaluation, NightlyState
from orchestrator.nightly.targets import Target
from remote_payload.wire.codec import to_json
from remote_payload.wire.names import printable

logger = logging.getLogger(__name__)
_WORST_FIRST = (
    ExitCode.INTERNAL,
    ExitCode.INTEGRITY,
    ExitCode.JOB_FAILED,
    ExitCode.NODE_UNFIT,
    ExitCode.AUTHENTICATION,
    ExitCode.USAGE,
    ExitCode.UNREACHABLE,
    ExitCode.DEFERRED,
    ExitCode.INTERRUPTED,
)
_OUTCOME_WORDS = {"pass": "pass", "warn": "warning", "fail": "FAIL", "not_measured": "not measured"}


@dataclasses.dataclass(frozen=True)
class TargetOutcome:
    """What evaluating a target came to. `overall` is an outcome's value; `regressions` are sentences."""

    run_id: str
    overall: str
    regressions: tuple[str, ...] = ()
    report: str | None = None


@dataclasses.dataclass(frozen=True)
class TargetResult:
    """One target after a tick. `unchanged`: what its last evaluation found stands; `error`: there is no result."""

    name: str
    status: Literal["evaluated", "unchanged", "error"]
    exit_code: int
    run_id: str | None = None
    overall: str | None = None
    regressions: tuple[str, ...] = ()
    report: str | None = None
    error: str | None = None
    action: str | None = None


@dataclasses.dataclass(frozen=True)
class NightlySummary:
    """All targets of a tick in their order, and its exit code."""

    targets: tuple[TargetResult, ...]
    exit_code: int

    def to_json(self) -> dict[str, Any]:
        return dict(to_json(self))

    def to_text(self) -> str:
        """One line a target, its regressions and errors below it; safe for a terminal."""
        width = max((len(t.name) for t in self.targets), default=0)
        lines = [line for target in self.targets for line in _lines(target, width)]
        return printable("\n".join([*lines, _total(self.targets)])) + "\n"


def tick(
    layout: LocalLayout,
    targets: Sequence[Target],
    run_target: Callable[[Target], TargetOutcome],
    checkpoint_identity: Callable[[Target], str],
) -> NightlySummary:
    """Evaluate each target whose checkpoint or definition is new since its last evaluation.

    `checkpoint_identity` tells a checkpoint apart from every other content of the same path. Only a finished evaluation
    is remembered: a target that ended with an error is tried again at the next tick. Raises `LockedError` while another
    tick is at it; a target's own errors become its result.
    """
    with exclusive_lock(layout.nightly_lock, "the nightly targets"), NightlyState.open(layout) as state:
        results = tuple(_visit(target, state, run_target, checkpoint_identity) for target in targets)
    return NightlySummary(results, int(exit_code(results)))


def exit_code(results: Sequence[TargetResult]) -> ExitCode:
    """0: every target passes. 1: a verdict of fail or not measured, or a regression. Otherwise the worst error's code.

    It speaks of what stands: a checkpoint that failed last night and has not changed since still fails. A warning
    passes.
    """
    codes = [ExitCode(result.exit_code) for result in results]
    if ExitCode.VERDICT_FAIL in codes:
        return ExitCode.VERDICT_FAIL
    return min((c for c in codes if c is not ExitCode.DONE), key=_WORST_FIRST.index, default=ExitCode.DONE)


def _visit(
    target: Target,
    state: NightlyState,
    run_target: Callable[[Target], TargetOutcome],
    checkpoint_identity: Callable[[Target], str],
) -> TargetResult:
    try:
        identity = checkpoint_identity(target)
        last = state.last(target.name)
        if last and (last.identity, last.definition_key) == (identity, target.definition_key):
            code = int(_verdict_code(last.overall, last.regressions))
            return TargetResult(target.name, "unchanged", code, last.run_id, last.overall, last.regressions)
        outcome = run_target(target)
        code = int(_verdict_code(outcome.overall, outcome.regressions))
        state.record(
            target.name,
            Evaluation(identity, target.definition_key, outcome.run_id, outcome.overall, outcome.regressions),
        )
    except RemoteEvalError as error:
        logger.warning("target %s: %s", target.name, error)
        code = int(error.exit_code)
        return TargetResult(target.name, "error", code, error=str(error), action=error.action or None)
    except Exception as error:
        # The one place where a mistake of ours must not cost the other targets their night.
        logger.exception("target %s", target.name)
        return TargetResult(
            target.name,
            "error",
            int(ExitCode.INTERNAL),
            error=f"our own mistake: {type(error).__name__}: {error}",
            action="The log file has the traceback.",
        )
    return TargetResult(
        target.name, "evaluated", code, outcome.run_id, outcome.overall, outcome.regressions, outcome.report
    )


def _verdict_code(overall: str, regressions: Sequence[str]) -> ExitCode:
    passes = overall in ("pass", "warn") and not regressions
    return ExitCode.DONE if passes else ExitCode.VERDICT_FAIL


def _lines(target: TargetResult, width: int) -> list[str]:
    name = f"{target.name:{width}}  {target.status:9}"
    if target.status == "error":
        action = [f"{'':{width}}  next: {target.action}"] if target.action else []
        return [f"{name}  {target.error}", *action]
    place = target.report or target.run_id or ""
    verdict = _OUTCOME_WORDS.get(target.overall or "", target.overall or "")
    return [f"{name}  {verdict:12}  {place}", *(f"{'':{width}}  worse: {r}" for r in target.regressions)]


def _total(targets: Sequence[TargetResult]) -> str:
    evaluated = sum(t.status == "evaluated" for t in targets)
    unchanged = sum(t.status == "unchanged" for t in targets)
    errors = sum(t.status == "error" for t in targets)
    bad = sum(t.exit_code == ExitCode.VERDICT_FAIL for t in targets)
    return (
        f"{len(targets)} targets: {evaluated} evaluated, {unchanged} unchanged, {errors} with errors; "
        f"{bad} failing, worse or not measured"
    )
