"""`python -m remote_payload.reconstruct --checkpoint F --config C --out DIR`: the job by hand, without a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from remote_payload.jobs.context import JobContext
from remote_payload.wire.codec import WireError, from_json
from remote_payload.wire.plan import EvaluationSettings, GpuPolicy, JobSpec, NodePlan, OverrunPolicy

_JOB = "reconstruct"
_ALL_GPUS = 1024


class ConfigError(Exception):
    """The config file cannot be read here; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when the job ran to its end, 1 when it could not evaluate, 2 for what was asked for wrongly."""
    parser = argparse.ArgumentParser(prog="python -m remote_payload.reconstruct", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=None, help="JSON, or YAML where PyYAML is installed")
    parser.add_argument("--out", type=Path, required=True, help="folder for reconstruct.json and pictures")
    parser.add_argument("--adapter", default=None, help="module:Class, looked for in the current folder too")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--num-samples", type=int, default=None, help="how many samples get pictures")
    parser.add_argument("--metric-samples", type=int, default=None, help="how many samples count; default: all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--devices", type=int, default=None, help="so many GPUs at most, or processes of the CPU")
    parser.add_argument("--check", action="store_true", help="only say whether adapter, checkpoint and data fit")
    options = parser.parse_args(list(arguments))
    sys.path.insert(0, str(Path.cwd()))
    try:
        plan = _plan(options)
    except (ConfigError, WireError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return _check(plan) if options.check else _run(plan, options.out)


def settings_of(document: Any, name: str, text: str) -> EvaluationSettings:
    """A config's settings: its `remote_eval:` section, or defaults with the whole text for a config of the user's own.

    Raises `ConfigError` for an unknown key, `WireError` for a value of a wrong type.
    """
    if not isinstance(document, dict) or "remote_eval" not in document:
        return EvaluationSettings(user_config_name=name, user_config_text=text)
    section = document["remote_eval"]
    if not isinstance(section, dict):
        raise ConfigError(f"{name}: remote_eval is no mapping")
    unknown = sorted(set(section) - {f.name for f in dataclasses.fields(EvaluationSettings)})
    if unknown:
        raise ConfigError(f"{name}: remote_eval has unknown keys: {', '.join(map(str, unknown))}")
    return from_json(EvaluationSettings, section, "remote_eval")


def _plan(options: argparse.Namespace) -> NodePlan:
    settings = _read_settings(options.config) if options.config else EvaluationSettings()
    changes: dict[str, Any] = {}
    if options.adapter is not None:
        changes["adapter"] = options.adapter
    if options.num_samples is not None:
        changes["num_samples"] = options.num_samples
    if options.metric_samples is not None:
        changes["metric_samples"] = options.metric_samples
    if options.data:
        changes["data"] = {**settings.data, **dict(_pair(item) for item in options.data)}
    return NodePlan(
        run_id="by-hand",
        payload_sha256="0" * 64,
        jobs=(JobSpec(_JOB),),
        checkpoint_path=str(options.checkpoint.absolute()),
        settings=dataclasses.replace(settings, **changes),
        gpu=GpuPolicy(device=options.device, count=_device_count(options.devices, options.device)),
        overrun=OverrunPolicy(),
    )


def _device_count(wanted: Optional[int], device: str) -> int:
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--devices {wanted} is no number of devices")
    return wanted or (1 if device == "cpu" else _ALL_GPUS)


def _pair(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--data {item!r} does not have the form NAME=PATH")
    return name, path


def _read_settings(path: Path) -> EvaluationSettings:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return settings_of(json.loads(text), path.name, text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path}: PyYAML is not installed here; write the config as JSON") from None
    try:
        return settings_of(yaml.safe_load(text), path.name, text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _run(plan: NodePlan, out: Path) -> int:
    from remote_payload.reconstruct.job import ReconstructError, run

    out.mkdir(parents=True, exist_ok=True)
    context = JobContext(plan, _JOB, out)
    status = 0
    try:
        run(context)
    except ReconstructError as error:
        print(error, file=sys.stderr)
        status = 1
    document = json.loads((out / f"{_JOB}.json").read_text())
    print(document["headline"])
    print(f"task evidence: {document['verdict']['dimensions']['task_evidence'].replace('_', ' ')}")
    print(out / f"{_JOB}.json")
    return status


def _check(plan: NodePlan) -> int:
    from remote_payload.checkpoint import CheckpointError, read_header
    from remote_payload.reconstruct.preflight import check
    from remote_payload.wire.results import Severity

    try:
        findings = check(plan, read_header(plan.checkpoint_path))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    for finding in findings:
        print(f"{finding.severity.value}: {finding.id}: {finding.title}")
    if not findings:
        print("adapter, checkpoint and data fit")
    return 1 if any(f.severity is Severity.ERROR for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
