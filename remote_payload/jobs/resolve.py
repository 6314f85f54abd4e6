"""From a job's name in the plan to the function that does it."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Callable

from remote_payload.jobs.context import JobContext
from remote_payload.wire.layout import NodeLayout
from remote_payload.wire.plan import JobSpec, NodePlan

JobFunction = Callable[[JobContext], Any]

_BUILTIN = {
    "health": ("remote_payload.health.job", "run"),
    "reconstruct": ("remote_payload.reconstruct.job", "run"),
}
_NEEDS_NO_CODE = {"health"}


class JobNotFoundError(Exception):
    """The plan names a job that is not there."""


def find_spec(plan: NodePlan, name: str) -> JobSpec:
    for spec in plan.jobs:
        if spec.name == name:
            return spec
    raise JobNotFoundError(f"the plan has no job named {name!r}")


def find_function(spec: JobSpec) -> JobFunction:
    """Import the job's function. Raises `JobNotFoundError`, or whatever the user's module raises when imported."""
    if spec.entry == "builtin":
        if spec.name not in _BUILTIN:
            raise JobNotFoundError(f"there is no built-in job named {spec.name!r}")
        module_name, function_name = _BUILTIN[spec.name]
    else:
        module_name, colon, function_name = spec.entry.partition(":")
        if not (module_name and colon and function_name):
            raise JobNotFoundError(f"job {spec.name}: {spec.entry!r} does not have the form module:function")
    found: Any = importlib.import_module(module_name)
    for part in function_name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise JobNotFoundError(f"job {spec.name}: {module_name} has no function {function_name}")
    function: JobFunction = found
    return function


def add_shipped_code(layout: NodeLayout, plan: NodePlan, spec: JobSpec) -> None:
    """Let the user's modules be imported, behind our own, for the jobs that use them (adapters included)."""
    is_builtin = spec.entry == "builtin"
    if plan.code is None or (is_builtin and spec.name in _NEEDS_NO_CODE):
        return
    folder = layout.code_folder(plan.code.archive_sha256)
    if not os.path.isdir(folder):
        raise JobNotFoundError(f"the shipped code is not on this node ({folder})")
    sys.path.insert(1, folder)
