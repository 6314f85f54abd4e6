"""The checks. Each is a function that returns its checks and raises nothing of ours."""

from __future__ import annotations

import dataclasses
import enum
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator

from orchestrator.errors import RemoteEvalError
from orchestrator.layout import LocalLayout
from orchestrator.node import CLOCK_OFFSET_WARNING_S, Node
from remote_payload.wire.messages import GcReport, GcRequest
from remote_payload.wire.names import printable
from remote_payload.wire.results import Severity
from remote_payload.wire.run_messages import Preflight, PreflightRequest
from remote_payload.wire.units import human_bytes

PROBE_TIMEOUT_S = 180.0
SLOW_LOGIN_S = 5.0
LOW_SPACE_BYTES = 2 * 1024**3
_GIB = 1024**3


class CheckState(str, enum.Enum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Check:
    """One fact, and what to do where it is not well."""

    name: str
    state: CheckState
    message: str
    action: str = ""


def check_this_machine(layout: LocalLayout) -> Iterator[Check]:
    """Python, ssh, our folders."""
    yield Check("python", CheckState.OK, platform.python_version())
    yield _ssh_binary()
    yield _data_folder(layout)


def check_node(node: Node, gpu_policy: str) -> Iterator[Check]:
    """Login, shell, agent, root, clock, space, torch and GPUs of a node. Stops where nothing further can be told."""
    began = time.monotonic()
    try:
        description = node.description
    except RemoteEvalError as error:
        yield _from_error("login", error)
        return
    yield Check("login", CheckState.OK, printable(description))
    try:
        hello = node.hello
    except RemoteEvalError as error:
        yield _from_error("agent", error)
        return
    seconds = time.monotonic() - began
    yield Check(
        "agent",
        CheckState.OK if seconds < SLOW_LOGIN_S else CheckState.WARNING,
        f"Python {hello.python_version} on {printable(hello.hostname)}, login and first answer in {seconds:.1f} s",
        "" if seconds < SLOW_LOGIN_S else "A slow shell start-up file on the node? Try `ssh HOST true` with `time`.",
    )
    yield _shell_noise(node)
    yield _clock(node)
    yield Check(
        "node root",
        CheckState.OK if hello.root_writable else CheckState.ERROR,
        printable(hello.root),
        "" if hello.root_writable else "Choose another `node_root` in the profile.",
    )
    yield from _fitness(node, gpu_policy)


def _ssh_binary() -> Check:
    path = shutil.which("ssh")
    if path is None:
        return Check(
            "ssh", CheckState.WARNING, "no ssh binary", "Install the OpenSSH client; only Fabric works without."
        )
    try:
        done = subprocess.run([path, "-V"], capture_output=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("ssh", CheckState.WARNING, f"{path} does not run: {error}", "Reinstall the OpenSSH client.")
    return Check("ssh", CheckState.OK, printable(done.stderr.decode(errors="replace").strip()))


def _data_folder(layout: LocalLayout) -> Check:
    try:
        layout.make_private(layout.data)
        probe = layout.data / f".probe-{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(layout.data).free
    except OSError as error:
        return Check("data folder", CheckState.ERROR, f"{layout.data}: {error}", "Set REMOTE_EVAL_HOME elsewhere.")
    state = CheckState.OK if free > LOW_SPACE_BYTES else CheckState.WARNING
    action = "" if state is CheckState.OK else "Free some space, or set REMOTE_EVAL_HOME."
    return Check("data folder", state, f"{layout.data}, {free / _GIB:.0f} GiB free", action)


def _shell_noise(node: Node) -> Check:
    try:
        noise = node.shell_noise()
    except RemoteEvalError as error:
        return _from_error("shell", error)
    if noise.strip():
        shown = printable(noise.decode(errors="replace")).strip().splitlines()[0][:100]
        return Check("shell", CheckState.WARNING, f"start-up files print {shown!r}", "Harmless here; scp minds.")
    return Check("shell", CheckState.OK, "prints nothing of its own")


def _clock(node: Node) -> Check:
    offset = node.clock_offset_s()
    state = CheckState.OK if abs(offset) < CLOCK_OFFSET_WARNING_S else CheckState.WARNING
    action = "" if state is CheckState.OK else "Check NTP on both."
    return Check("clock", state, f"{offset:+.1f} s against this machine", action)


def _fitness(node: Node, gpu_policy: str) -> Iterator[Check]:
    request = PreflightRequest(node.layout.root, gpu_policy=gpu_policy, timeout_s=PROBE_TIMEOUT_S)
    try:
        report = node.call("preflight", request, Preflight, timeout_s=PROBE_TIMEOUT_S + 30)
    except RemoteEvalError as error:
        yield _from_error("preflight", error)
        return
    yield Check(
        "torch",
        CheckState.OK if report.torch_version else CheckState.ERROR,
        printable(f"torch {report.torch_version}, CUDA {report.cuda_version}, driver {report.driver_version}"),
    )
    gpus = [f"{g.name}, {g.free_bytes / _GIB:.0f} of {g.total_bytes / _GIB:.0f} GiB free" for g in report.gpus]
    yield Check("gpus", CheckState.OK, printable("; ".join(gpus) or "none"))
    yield _store(node)
    states = {Severity.ERROR: CheckState.ERROR, Severity.WARNING: CheckState.WARNING, Severity.INFO: CheckState.OK}
    for finding in report.findings:
        message = f"{finding.title}. {finding.explanation}".strip()
        yield Check(finding.id, states[finding.severity], printable(message), printable(finding.action))


def _store(node: Node) -> Check:
    """What our store takes of the node's disk, its bound, and what is left."""
    limit = node.profile.store_limit_bytes
    try:
        report = node.call("gc", GcRequest(node.layout.root), GcReport, timeout_s=PROBE_TIMEOUT_S)
    except RemoteEvalError as error:
        return _from_error("store", error)
    size, pinned = human_bytes(report.store_bytes), sum(file.size for file in report.pinned)
    message = f"{size} {f'of at most {human_bytes(limit)}' if limit is not None else 'without a limit'}"
    message += f", {human_bytes(pinned)} of it needed now; {human_bytes(report.free_bytes)} free on its disk"
    if limit is not None and report.store_bytes > limit:
        action = "`remote-eval gc --delete` brings it below the limit, as far as no run needs it."
        return Check("store", CheckState.WARNING, message, action)
    return Check("store", CheckState.OK, message)


def _from_error(name: str, error: RemoteEvalError) -> Check:
    message = str(error) + (f" ({error.details.splitlines()[-1]})" if error.details else "")
    return Check(name, CheckState.ERROR, printable(message), printable(error.action))
