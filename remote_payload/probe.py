"""The node's check, as a child process of the agent's `preflight`.

Each phase is announced before it begins, since any of them may hang, and what was found so far is told after each. By
hand, `payload probe` prints the facts of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from remote_payload.agent import gpus, quota, room, root
from remote_payload.agent.preflight import REQUEST_FD_VARIABLE, STACKS_FD_VARIABLE
from remote_payload.jobs.context import PROGRESS_FD_VARIABLE
from remote_payload.jobs.resolve import JobNotFoundError, add_shipped_code
from remote_payload.wire.codec import from_json, to_json
from remote_payload.wire.folders import folder_fingerprint
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import BUILTIN_JOBS, GpuPolicy, JobSpec, NodePlan
from remote_payload.wire.results import Dimension, Finding, Severity
from remote_payload.wire.run_messages import Preflight, PreflightRequest

OLDEST_TORCH = (2, 2)
_LOW_DISK_BYTES = 1024**3
_NO_DISK_BYTES = 64 * 1024**2
_DAMAGE = {"truncated", "malformed"}


def main(arguments: Sequence[str]) -> int:
    """0 when the check ran to its end, whatever it found."""
    os.umask(0o077)
    if arguments:
        print("usage: payload probe", file=sys.stderr)
        return 2
    stacks = _take_descriptor(STACKS_FD_VARIABLE)
    if stacks is not None:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    question = _take_descriptor(REQUEST_FD_VARIABLE)
    progress = _take_descriptor(PROGRESS_FD_VARIABLE)
    if question is None:
        request = PreflightRequest(root=os.path.expanduser("~"))
    else:
        with open(question, "rb") as file:
            request = from_json(PreflightRequest, json.loads(file.read()))
    probe = Probe(request, progress)
    probe.run()
    if progress is None:
        print(json.dumps(to_json(probe.result), indent=1))
    return 0


class Probe:
    """Gathers a `Preflight`, phase by phase."""

    def __init__(self, request: PreflightRequest, progress: Optional[int]) -> None:
        self._request = request
        self._plan = request.plan
        self._progress = progress
        self._policy = request.plan.gpu if request.plan else GpuPolicy(device=request.gpu_policy)
        self._gpus: tuple[gpus.GpuFacts, ...] = ()
        self.result = Preflight(
            python_version=platform.python_version(),
            torch_version=None,
            cuda_version=None,
            driver_version=None,
            gpus=(),
            free_bytes=0,
            findings=(),
        )

    def run(self) -> None:
        with self._phase("disk"):
            self._look_at_disk()
        with self._phase("gpus"):
            self._look_at_gpus()
        with self._phase("torch"):
            is_there = self._find_torch()
            torch = self._import_torch() if is_there and not self._request.is_brief else None
        if self._request.is_brief:
            return
        if torch is not None:
            with self._phase("cuda"):
                self._look_at_cuda(torch)
        if self._plan is not None:
            with self._phase("header"):
                header = self._header(self._plan)
            if header is not None and any(spec.name == "reconstruct" for spec in self._plan.jobs):
                with self._phase("adapter"):
                    self._check_adapter(self._plan, header, torch)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._send({"phase": name})
        started = time.monotonic()
        yield
        seconds = {**self.result.seconds, name: round(time.monotonic() - started, 3)}
        self.result = dataclasses.replace(self.result, seconds=seconds)
        self._send({"result": to_json(self.result)})

    def _send(self, value: dict[str, Any]) -> None:
        if self._progress is None:
            return
        left = memoryview(json.dumps(value).encode() + b"\n")
        while left:
            left = left[os.write(self._progress, left) :]

    def _add(self, *findings: Finding) -> None:
        self.result = dataclasses.replace(self.result, findings=(*self.result.findings, *findings))

    def _header(self, plan: NodePlan) -> Optional[Any]:
        """The checkpoint's header, from the file or, where that is yet to be sent, from what the client read of it."""
        checkpoint = importlib.import_module("remote_payload.checkpoint")
        if self._request.header is None:
            header = self._read_header(checkpoint, plan)
        else:
            header = from_json(checkpoint.CheckpointHeader, {**self._request.header, "records": []})
        if header is not None:
            self.result = dataclasses.replace(self.result, header=self._request.header or header.to_json())
            self._add(*checkpoint.header_findings(header))
        return header

    def _look_at_disk(self) -> None:
        folder = self._request.root
        free = root.free_bytes(folder)
        self.result = dataclasses.replace(self.result, free_bytes=free)
        if not root.is_writable(folder):
            self._add(
                Finding(
                    id="node.not_writable",
                    severity=Severity.ERROR,
                    title=f"Nothing can be written in {folder}",
                    action="Name a node_root in the profile where this user may write and has space.",
                )
            )
        left = quota.space_left(folder)
        needed = max(0, self._request.needed_bytes)
        if left < needed + _LOW_DISK_BYTES:
            # A warning only: the node may have most of the file already. The receiver makes room, or refuses.
            freeable = room.freeable_bytes(NodeLayout(folder)) if needed else 0
            wanted = f"; the checkpoint takes up to {needed / 1024**2:.0f} MiB of them" if needed else ""
            self._add(
                Finding(
                    id="node.low_disk",
                    severity=Severity.ERROR if left + freeable < _NO_DISK_BYTES else Severity.WARNING,
                    title=f"Only {left / 1024**2:.0f} MiB are left under the node root{wanted}",
                    evidence={"free_bytes": left, "needed_bytes": needed, "folder": folder},
                    action="Free some space there (`remote-eval gc`), or name another node_root in the profile.",
                )
            )

    def _look_at_gpus(self) -> None:
        if self._policy.device == "cpu":
            return
        self._gpus = gpus.allowed_by_environment(gpus.find_gpus(), os.environ.get(gpus.VISIBLE_VARIABLE))
        self.result = dataclasses.replace(
            self.result,
            gpus=tuple(gpu.as_message() for gpu in self._gpus),
            driver_version=self._gpus[0].driver_version if self._gpus else None,
        )
        self._add(*gpu_findings(self._policy, self._gpus))

    def _find_torch(self) -> bool:
        if importlib.util.find_spec("torch") is None:
            self._add(_torch_missing(self._plan))
            return False
        return True

    def _import_torch(self) -> Optional[Any]:
        try:
            torch = importlib.import_module("torch")
        except (ImportError, OSError) as error:
            self._add(
                Finding(
                    id="node.torch_import_fails",
                    severity=Severity.ERROR,
                    title="torch is installed on this node and cannot be imported",
                    evidence={"error": str(error)[:2000], "python": sys.executable},
                    action="Mend that installation, or name another Python or conda environment in the profile.",
                )
            )
            return None
        version = str(torch.__version__)
        self.result = dataclasses.replace(
            self.result, torch_version=version, cuda_version=getattr(torch.version, "cuda", None)
        )
        if version_numbers(version) < OLDEST_TORCH:
            self._add(
                Finding(
                    id="node.torch_too_old",
                    severity=Severity.ERROR,
                    title=f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}",
                    evidence={"torch_version": version, "python": sys.executable},
                    action="Name a Python with a newer torch in the profile.",
                )
            )
        return torch

    def _look_at_cuda(self, torch: Any) -> None:
        if self._policy.device == "cpu" or not self._gpus or torch.cuda.is_available():
            return
        self._add(
            Finding(
                id="node.cuda_unusable",
                severity=Severity.ERROR if self._policy.device == "cuda" else Severity.WARNING,
                title="This node has GPUs that its torch cannot use",
                evidence={
                    "torch_version": self.result.torch_version,
                    "torch_cuda_version": self.result.cuda_version,
                    "driver_version": self.result.driver_version,
                },
                action="Install a torch that is built for CUDA and for this driver.",
            )
        )

    def _read_header(self, checkpoint: Any, plan: NodePlan) -> Optional[Any]:
        path = plan.checkpoint_path
        try:
            self._add(*_changed_since_planned(plan))
            return checkpoint.read_header(path)
        except OSError as error:
            self._add(unreadable("unreadable", f"The checkpoint cannot be read: {error.strerror}", path))
        except checkpoint.CheckpointError as error:
            self._add(unreadable(error.kind, str(error), path, error.action), *error.findings)
        return None

    def _check_adapter(self, plan: NodePlan, header: Any, torch: Optional[Any]) -> None:
        if plan.settings.adapter is None or torch is None:
            return
        try:
            add_shipped_code(NodeLayout(self._request.root), plan, JobSpec("reconstruct"))
        except JobNotFoundError as error:
            self._add(Finding(id="node.code_missing", severity=Severity.ERROR, title=str(error)))
            return
        preflight = importlib.import_module("remote_payload.reconstruct.preflight")
        self._add(*preflight.check(plan, header, self._note_step))

    def _note_step(self, step: str) -> None:
        self.result = dataclasses.replace(self.result, adapter_steps=(*self.result.adapter_steps, step))


def gpu_findings(policy: GpuPolicy, found: Sequence[gpus.GpuFacts]) -> list[Finding]:
    """What stands between the policy and the GPUs: an error where it asks for CUDA, else the CPU will do."""
    needed = policy.device == "cuda"
    if not found:
        return [
            Finding(
                id="node.no_gpu",
                severity=Severity.ERROR if needed else Severity.INFO,
                title="nvidia-smi shows no GPU on this node",
                action="Choose another node, or `device: cpu` in the profile." if needed else "",
            )
        ]
    fit = gpus.in_order_of_preference(found, policy)
    if len(fit) >= max(1, policy.count):
        return []
    return [
        Finding(
            id="node.gpu_busy",
            severity=Severity.ERROR if needed else Severity.WARNING,
            title=f"{len(fit)} of {len(found)} GPUs are free, {policy.count} wanted",
            evidence={f"gpu_{gpu.index}": gpus.unfit_reason(gpu, policy) or "free" for gpu in found},
            action="Wait, choose another node, or allow less in the profile's `gpu` section.",
        )
    ]


def version_numbers(version: str) -> tuple[int, int]:
    """(major, minor) of a version text; what is no number counts as 0."""
    parts = [part if part.isdigit() else "0" for part in (*version.split("+")[0].split("."), "0", "0")]
    return int(parts[0]), int(parts[1])


def _torch_missing(plan: Optional[NodePlan]) -> Finding:
    needed = plan is None or any(spec.entry == "builtin" and spec.name in BUILTIN_JOBS for spec in plan.jobs)
    return Finding(
        id="node.torch_missing",
        severity=Severity.ERROR if needed else Severity.WARNING,
        title="The node's Python has no torch",
        evidence={"python": sys.executable, "python_version": platform.python_version()},
        action="Name a Python, conda environment, modules or a container with torch in the profile's `python` section.",
    )


def _changed_since_planned(plan: NodePlan) -> list[Finding]:
    if len(plan.checkpoint_fingerprint) != 3:
        return []
    now = _fingerprint(plan.checkpoint_path)
    if now == tuple(plan.checkpoint_fingerprint):
        return []
    return [
        Finding(
            id="integrity.changed_since_planned",
            severity=Severity.ERROR,
            title="The checkpoint is not the one that the run was planned for",
            dimension=Dimension.INTEGRITY,
            where=(plan.checkpoint_path,),
            evidence={"planned": list(plan.checkpoint_fingerprint), "now": list(now)},
            explanation="Size, modification time or inode differ: it was replaced or written to since.",
            action="Start a new run.",
        )
    ]


def _fingerprint(path: str) -> tuple[int, int, int]:
    if os.path.isdir(path):
        try:
            found = folder_fingerprint(path)
        except ValueError:
            # It could be listed when it was planned, and has more files than that by now.
            return -1, 0, 0
        return found.size, found.mtime_ns, found.inode
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def unreadable(kind: str, words: str, path: str, action: str = "") -> Finding:
    """The finding for a checkpoint that cannot be read at all; damage counts as integrity, the rest as a wrong file."""
    return Finding(
        id=f"{'integrity' if kind in _DAMAGE else 'checkpoint'}.{kind}",
        severity=Severity.ERROR,
        title=words[:500],
        dimension=Dimension.INTEGRITY,
        where=(path,),
        action=action or "Check that the file is there and may be read by this user.",
    )


def _take_descriptor(variable: str) -> Optional[int]:
    value = os.environ.pop(variable, "")
    return int(value) if value.isdigit() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
