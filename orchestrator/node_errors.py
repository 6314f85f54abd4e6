"""The client's errors for what a node could not do: by the scripts that reach the agent, or by the agent itself."""

from __future__ import annotations

from orchestrator.errors import (
    IntegrityError,
    InternalError,
    LockedError,
    NodeUnfitError,
    NoSpaceError,
    RemoteEvalError,
    UsageError,
)
from orchestrator.node_script import (
    CONDA_FAILED,
    CONDA_MISSING,
    MODULE_FAILED,
    MODULES_MISSING,
    PYTHON_MISSING,
    ROOT_FOREIGN,
    ROOT_UNWRITABLE,
    RUNTIME_MISSING,
)
from orchestrator.profiles import ClusterProfile
from remote_payload.wire.failures import RemoteFailure
from remote_payload.wire.names import printable

_ENVIRONMENT_PROBLEMS = {
    PYTHON_MISSING: (
        "the node has no {python}",
        "Set `python: {{path: …}}` in the profile to one that exists.",
    ),
    MODULES_MISSING: ("the node has no `module` command", "Remove `python.modules` from the profile."),
    MODULE_FAILED: ("`module load` failed on the node", "Check `python.modules` with `module avail` there."),
    CONDA_MISSING: ("conda was not found on the node", "Set `python.path` to the environment's interpreter."),
    CONDA_FAILED: (
        "`conda activate` failed on the node",
        "Check `python.conda_env` with `conda env list` there.",
    ),
    RUNTIME_MISSING: ("the container runtime was not found on the node", "Check `python.container.runtime`."),
    ROOT_FOREIGN: (
        "the node root {root} holds files and lacks our marker",
        "Choose an empty or new folder as `node_root` in the profile.",
    ),
    ROOT_UNWRITABLE: (
        "cannot write in the node root {root}",
        "Choose another `node_root`, or free space or quota.",
    ),
}

_FAILURES: dict[str, type[RemoteEvalError]] = {
    "usage": UsageError,
    "unfit": NodeUnfitError,
    "no_space": NoSpaceError,
    "integrity": IntegrityError,
    "conflict": LockedError,
    "not_found": UsageError,
    "internal": InternalError,
}


def remote_error(failure: RemoteFailure) -> RemoteEvalError:
    """The client's exception for what the agent could not do."""
    kind = _FAILURES.get(failure.kind, InternalError)
    return kind(printable(failure.message), action=printable(failure.action), details=printable(failure.detail))


def environment_error(outcome: str | None, profile: ClusterProfile, details: str) -> NodeUnfitError | None:
    """What to raise for what a script said stopped it; None where the environment is not to blame."""
    problem = _ENVIRONMENT_PROBLEMS.get(outcome or "")
    if problem is None:
        return None
    cause, action = problem
    names = {"python": profile.python.path, "root": profile.node_root}
    return NodeUnfitError(cause.format(**names), action=action.format(**names), details=details)
