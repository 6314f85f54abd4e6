"""Commands about the user's adapter: make a first one, check one."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.output import print_json
from orchestrator.cli.session import services
from orchestrator.cli.views import CheckList
from orchestrator.errors import ConfigurationError, ExitCode, UsageError

if TYPE_CHECKING:
    from orchestrator.adapters import AdapterSource
    from orchestrator.doctor import Check
    from orchestrator.project import Project


def new(path: Path, kind: str, class_name: str, *, as_json: bool) -> int:
    """Write a first adapter to `path`, and say what the project file must name."""
    from orchestrator.adapters import KINDS, scaffold

    if kind not in KINDS:
        raise UsageError(f"there is no kind {kind!r}", action=f"Choose one of {', '.join(KINDS)}.")
    module = [*path.with_suffix("").parts]
    if path.suffix != ".py" or path.is_absolute() or not all(part.isidentifier() for part in module):
        raise UsageError(
            f"{path} cannot be imported as a module",
            action="Name a .py file below this folder, of letters, digits and underscores: evaluation/adapter.py.",
        )
    try:
        text = scaffold(kind, class_name)
    except ValueError as error:
        raise UsageError(str(error), action="Give --class a name such as MyAdapter.") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already, and stays as it is", action="Name another file.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", action="Choose another folder.") from error
    name = f"{'.'.join(module)}:{class_name}"
    if as_json:
        print_json({"path": str(path), "adapter": name, "kind": kind})
        return int(ExitCode.DONE)
    print(f"{path} is made. Write your model into build_model, and look at the shape, the layout and the range.")
    print("In remote-eval.yaml, at the top of your repository:")
    print(f"  adapter: {name}\n  code: [{module[0] if len(module) > 1 else path.name}]")
    print(f"Then `git add {path}`, and `remote-eval adapter check`.")
    return int(ExitCode.DONE)


def check(cluster: str | None, checkpoint: str | None, config: Path | None, *, as_json: bool) -> int:
    """The source first; on a node too where a checkpoint is named. Exit 2 for the adapter, 5 for the node."""
    from orchestrator.project import find_project

    project = find_project(Path.cwd())
    shown = CheckList(as_json=as_json)
    for item in _source_checks(project, config):
        shown.show(item)
    if checkpoint is not None and not shown.failed:
        from orchestrator.pipeline.adapter_check import check_on_node
        from orchestrator.pipeline.resolve import Request

        request = Request(cluster, checkpoint, config, jobs=["reconstruct"], start_folder=Path.cwd())
        for item in check_on_node(request, services(quiet=as_json)):
            shown.show(item)
    elif not shown.failed and not as_json:
        print("the source is well; with --checkpoint (and --cluster) it is tried on a node as well")
    shown.finish()
    failed = shown.failed
    if not failed:
        return int(ExitCode.DONE)
    return int(ExitCode.NODE_UNFIT if all(name.startswith("node.") for name in failed) else ExitCode.USAGE)


class _AnyVariable(collections.abc.Mapping[str, str]):
    """Stands for the profile's variables where no cluster is asked: only the names of data matter here."""

    def __getitem__(self, name: str) -> str:
        return f"/{name}"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _source_checks(project: Project, config: Path | None) -> list[Check]:
    from orchestrator.adapters import AdapterSource, check_source, find_source
    from orchestrator.config import load_config

    path = config or (project.folder / project.file.config if project.file.config else None)
    settings = load_config(
        path, num_samples=0, adapter=project.file.adapter, variables=_AnyVariable(), data_base=Path("/")
    ).settings
    if settings.adapter is None:
        raise ConfigurationError(
            "no adapter is named",
            action="Set `adapter: module:Class` in remote-eval.yaml, or make one: `remote-eval adapter new`.",
        )
    found: AdapterSource | Check = find_source(settings.adapter, project)
    return [*check_source(found, sorted(settings.data))] if isinstance(found, AdapterSource) else [found]
