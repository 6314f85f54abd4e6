"""`python -m remote_payload.health CHECKPOINT --out DIR [--device auto|cpu|cuda]`: the health job by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.health.job import examine
from remote_payload.jobs.context import JobContext
from remote_payload.wire.names import printable
from remote_payload.wire.plan import HEALTH_PASSES, EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy


def main(arguments: list[str]) -> int:
    """Examine one checkpoint and write `DIR/health.json`. Returns 0 whatever the verdict, 2 without a file."""
    parser = argparse.ArgumentParser(prog="health", description="Examine a checkpoint and write DIR/health.json.")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for health.json, made if it is missing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--against", metavar="EARLIER", help="an earlier checkpoint of the run, to see what moved")
    parser.add_argument(
        "--passes",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="A,B",
        help="further passes over weight matrices: spectral (norm, stable rank), spectrum (all singular values, alpha)",
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.passes) - set(HEALTH_PASSES))
    if unknown:
        parser.error(f"unknown passes: {', '.join(unknown)}; there are {', '.join(HEALTH_PASSES)}")
    plan = NodePlan(
        run_id="by-hand",
        payload_sha256="",
        jobs=(JobSpec("health"),),
        checkpoint_path=options.checkpoint,
        settings=EvaluationSettings(),
        gpu=GpuPolicy(device=options.device),
        overrun=OverrunPolicy(),
    )
    context = JobContext(plan, "health", Path(options.out))
    try:
        document = examine(options.checkpoint, options.device, context, options.against, options.passes)
    except CheckpointError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    path = context.write_results(document)
    print(_summary(document))
    print(printable(str(path)))
    return 0


def _summary(document: dict[str, Any]) -> str:
    verdict = document["verdict"]
    lines = [f"verdict: {verdict['overall']}"]
    for dimension, outcome in verdict["dimensions"].items():
        lines.append(f"  {dimension.ljust(18)} {outcome.ljust(13)} {verdict['reasons'].get(dimension, '')}")
    lines.extend(f"{f['severity']}: {f['id']}: {f['title']}" for f in document["findings"])
    return "\n".join(printable(line).replace("\n", "\\n") for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
