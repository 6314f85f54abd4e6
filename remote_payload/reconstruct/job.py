"""The job `reconstruct`: runs the user's model on a split and says how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from remote_payload.jobs.context import JobContext
from remote_payload.wire.codec import to_json
from remote_payload.wire.results import (
    RESULTS_SCHEMA_VERSION,
    Dimension,
    Finding,
    Outcome,
    Severity,
    make_verdict,
)
from remote_payload.wire.states import Phase


class ReconstructError(Exception):
    """The evaluation could not be done; the document with its findings is written all the same."""


def run(context: JobContext) -> None:
    """Write `reconstruct.json`, `samples.jsonl` and pictures. Raises `ReconstructError` when it cannot evaluate."""
    settings = context.plan.settings
    if settings.adapter is None:
        context.write_results(_document(context, "Not measured: no adapter is named.", [_no_adapter()], {}))
        return
    # torch is imported here: without an adapter nobody waits for it.
    from remote_payload.checkpoint.errors import CheckpointError
    from remote_payload.reconstruct.evaluation import evaluate
    from remote_payload.reconstruct.loading import StructureError
    from remote_payload.reconstruct.protocol import AdapterError

    try:
        outcome = evaluate(context, settings.adapter)
    except StructureError as error:
        _refuse(context, list(error.findings), error)
    except AdapterError as error:
        _refuse(context, [_adapter_finding(error)], error)
    except CheckpointError as error:
        _refuse(context, [_checkpoint_finding(error), *error.findings], error)
    else:
        context.write_results(_document(context, outcome.headline, outcome.findings, outcome.facts, outcome.task))


def _document(
    context: JobContext,
    headline: str,
    findings: Sequence[Finding],
    facts: dict[str, Any],
    task: Optional[Outcome] = None,
) -> dict[str, Any]:
    outcome = task or Outcome.NOT_MEASURED
    verdict = make_verdict({Dimension.TASK_EVIDENCE.value: outcome}, {Dimension.TASK_EVIDENCE.value: headline})
    settings = context.plan.settings
    return {
        "schema_version": RESULTS_SCHEMA_VERSION,
        "job": context.job,
        "headline": headline,
        "findings": to_json(list(findings)),
        "verdict": to_json(verdict),
        "metrics": [],
        "pictures": [],
        "adapter": settings.adapter,
        "seed": settings.seed,
        **facts,
    }


def _refuse(context: JobContext, findings: list[Finding], error: Exception) -> None:
    context.progress(Phase.RUN, message=str(error))
    context.write_results(_document(context, f"Not measured: {error}", findings, {}))
    raise ReconstructError(str(error)) from error


def _no_adapter() -> Finding:
    return Finding(
        id="reconstruct.no_adapter",
        severity=Severity.INFO,
        title="No adapter is named, so the model was not run",
        dimension=Dimension.TASK_EVIDENCE,
        explanation="An adapter is a class of yours that builds the model and the samples. Without one nothing can be "
        "said about the task: the weights alone do not tell how good the model is.",
        action="Name it in the config or the project file: `adapter: module:Class`. examples/ holds short ones.",
    )


def _adapter_finding(error: Exception) -> Finding:
    return Finding(
        id="adapter.failed",
        severity=Severity.ERROR,
        title=str(error),
        explanation="The adapter does not do what it declares, or raised; the traceback is in stderr.log.",
        action="Mend the adapter; the preflight's dry run shows most of this before a run starts.",
    )


def _checkpoint_finding(error: Exception) -> Finding:
    return Finding(
        id="reconstruct.checkpoint_unreadable",
        severity=Severity.ERROR,
        title=str(error),
        dimension=Dimension.INTEGRITY,
        action=str(getattr(error, "action", "")),
    )
