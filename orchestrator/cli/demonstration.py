"""`remote-eval demo`: everything for real, on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from importlib import resources
from pathlib import Path

import remote_payload
from orchestrator.cli.runs import take_to_end
from orchestrator.cli.session import services
from orchestrator.errors import InternalError, NodeUnfitError
from orchestrator.fsutil import exclusive_lock, write_atomically
from orchestrator.pipeline.context import Reporter
from orchestrator.pipeline.resolve import Request, resolve
from remote_payload.wire.names import printable

PREPARE_LIMIT_S = 600.0
TRAIN_LIMIT_S = 1800.0
NUM_SAMPLES = 4
_CONFIG = """\
# Written by `remote-eval demo`.
remote_eval:
  adapter: remote_payload.reference.adapter:ReferenceAdapter
  data: {film: data}
  seed: 0
  batch_size: 16
"""


def demo(*, as_json: bool) -> int:
    """Train or reuse the small checkpoint, then run the whole job on the embedded node."""
    _refuse_missing_packages()
    world = services(as_json=as_json)
    folder = world.layout.make_private(world.layout.demo(_reference_key()))
    with exclusive_lock(folder / "lock", "the demonstration's data"):
        checkpoint = _prepare(folder, world.reporter)
    config = folder / "eval.yaml"
    write_atomically(config, _CONFIG.encode())
    world.reporter.stage("resolve")
    plan = resolve(Request("local", str(checkpoint), config, NUM_SAMPLES, start_folder=folder), world)
    world.reporter.note(f"run {plan.run_id} on {plan.cluster}")
    return take_to_end(plan, world, detach=False, retry=False, as_json=as_json)


def _refuse_missing_packages() -> None:
    missing = [name for name in ("torch", "numpy", "av") if importlib.util.find_spec(name) is None]
    if missing:
        raise NodeUnfitError(
            f"the demonstration runs on this machine and needs {', '.join(missing)}",
            action="In a clone: `make demo`. Else: pip install 'remote-eval[node,demo]'.",
        )


def _reference_key() -> str:
    """Tells one version of the reference model from another: data and checkpoint are made anew for each."""
    digest = hashlib.sha256()
    for entry in sorted(resources.files(remote_payload).joinpath("reference").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".py"):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()[:12]


def _prepare(folder: Path, reporter: Reporter) -> Path:
    data, checkpoint = folder / "data", folder / "checkpoint.pt"
    if not (data / "manifest.json").exists():
        reporter.stage("demo data")
        reporter.note("decoding real film and sound, simulating BOLD from them")
        _reference("prepare", "--out", str(data), limit_s=PREPARE_LIMIT_S)
    if not checkpoint.exists():
        reporter.stage("demo checkpoint")
        reporter.note("training the reference model at a small scale, about a minute on two cores")
        _reference("train", "--data", str(data), "--out", str(checkpoint), limit_s=TRAIN_LIMIT_S)
    return checkpoint


def _reference(*arguments: str, limit_s: float) -> None:
    command = [sys.executable, "-m", "remote_payload.reference", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise InternalError(
            f"`{arguments[0]}` took longer than {limit_s:.0f} s", action="Is this machine very busy? Try again."
        ) from None
    if done.returncode != 0:
        details = printable(done.stderr.decode(errors="replace")[-4000:])
        raise InternalError(f"`{arguments[0]}` failed", action="See the details.", details=details)
