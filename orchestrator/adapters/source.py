"""What an adapter's source tells without being run: is it shipped, does it parse, has the class what is called."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from orchestrator.doctor import Check, CheckState
from orchestrator.project import Project

_MAX_SOURCE_BYTES = 4 * 1024 * 1024
_BASE = "AdapterBase"
_PROTOCOL = "Adapter"
_PROTOCOL_SOURCE = Path("remote_payload") / "reconstruct" / "protocol.py"
_REQUIRED = ("build_model", "modalities", "samples", "predict")
"""What no base class gives."""


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """The file of `module:Class`, found below the project's folder."""

    name: str
    class_name: str
    path: Path
    text: str


def find_source(name: str, project: Project) -> AdapterSource | Check:
    """The adapter's source, or why there is none. The file must be among what is shipped, or the node has it not."""
    module, _, class_name = name.partition(":")
    base = project.folder.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            break
    else:
        return _error(
            "file",
            f"{name}: there is neither {_shown(base.with_suffix('.py'), project)} nor a package of that name",
            "Correct `adapter:`, or make one with `remote-eval adapter new`.",
        )
    relative = PurePosixPath(path.relative_to(project.folder).as_posix())
    shipped = [PurePosixPath(p) for p in project.file.code]
    if not any(relative == p or p in relative.parents or p == PurePosixPath(".") for p in shipped):
        return _error(
            "file",
            f"{relative} is not among the code that is shipped ({', '.join(project.file.code) or 'none is'})",
            f"Add `{relative.parts[0]}` under `code:` in {project.path or 'remote-eval.yaml'}.",
        )
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SOURCE_BYTES + 1)
        if len(data) > _MAX_SOURCE_BYTES:
            return _error("file", f"{relative} is larger than {_MAX_SOURCE_BYTES} bytes", "Is it a source file?")
        return AdapterSource(name, class_name, path, data.decode())
    except (OSError, UnicodeDecodeError) as error:
        return _error("file", f"{relative} cannot be read: {error}", "Check its permissions and its encoding (UTF-8).")


def check_source(source: AdapterSource, data: Sequence[str]) -> Iterator[Check]:
    """Checks of the source; `data` are the names that the config gives under `data:`. Nothing of it is run."""
    yield Check("file", CheckState.OK, str(source.path))
    try:
        tree = ast.parse(source.text, filename=str(source.path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        yield _error("syntax", f"{source.path}{f':{line}' if line else ''}: {error}", "Mend the syntax.")
        return
    yield Check("syntax", CheckState.OK, f"{source.text.count(chr(10))} lines")
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == source.class_name), None)
    if found is None:
        yield _missing_class(tree, source)
        return
    yield Check("class", CheckState.OK, source.class_name)
    yield from _check_methods(found)
    yield from _check_data(found, data)


def _missing_class(tree: ast.Module, source: AdapterSource) -> Check:
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.ImportFrom, ast.Import))
        for alias in node.names
    }
    if source.class_name in imported or "*" in imported:
        return Check("class", CheckState.WARNING, f"{source.class_name} comes from elsewhere: the node will tell")
    classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef)]
    there = f"; there are {', '.join(classes[:10])}" if classes else ""
    return _error("class", f"the file has no class {source.class_name}{there}", "Correct the name in `adapter:`.")


def _check_methods(found: ast.ClassDef) -> Iterator[Check]:
    wanted = protocol_methods()
    own = {n.name: n for n in found.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    bases = [ast.unparse(base) for base in found.bases]
    is_ours = any(base.split(".")[-1] == _BASE for base in bases)
    is_alone = not bases or bases == ["object"]
    required = _REQUIRED if is_ours else tuple(wanted) if is_alone else ()
    missing = [name for name in required if name not in own]
    if missing:
        how = "" if is_ours else f", and it does not subclass {_BASE}, which has defaults"
        yield _error("methods", f"{found.name} has no {', '.join(missing)}{how}", "Write them.")
    else:
        yield Check("methods", CheckState.OK, ", ".join(name for name in wanted if name in own))
    problems = [p for name, node in own.items() if name in wanted and (p := _problem(node, wanted[name]))]
    if "__init__" in own and _required_count(own["__init__"]) > 1:
        problems.append("__init__ takes arguments, and adapters are made without any")
    for problem in problems:
        yield _error("signatures", f"{found.name}.{problem}", "Give it the parameters that the protocol documents.")
    if not problems:
        yield Check("signatures", CheckState.OK, "as they are called")


def _check_data(found: ast.ClassDef, data: Sequence[str]) -> Iterator[Check]:
    for node in found.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not (isinstance(target, ast.Name) and target.id == "data_names" and isinstance(value, ast.expr)):
            continue
        try:
            names = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            yield Check("data", CheckState.WARNING, "data_names is computed: the node will tell")
            return
        if isinstance(names, str):
            yield _error("data", f"data_names is the text {names!r}, not a tuple of names", f"Write ({names!r},).")
            return
        missing = [str(name) for name in names if name not in data]
        if missing:
            text = f"the config's data lacks {', '.join(missing)}"
            yield _error("data", text, "Add the paths under `data:` in the config.")
            return
        yield Check("data", CheckState.OK, ", ".join(map(str, names)) or "none is named")


def protocol_methods() -> dict[str, list[str]]:
    """Each method of the protocol with its parameters' names behind `self`, read from its source: this side never
    imports what needs torch."""
    path = Path(__file__).resolve().parents[2] / _PROTOCOL_SOURCE
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (protocol,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == _PROTOCOL)
    methods = (n for n in protocol.body if isinstance(n, ast.FunctionDef))
    return {n.name: [a.arg for a in n.args.args[1:]] for n in methods}


def _problem(node: ast.FunctionDef | ast.AsyncFunctionDef, wanted: Sequence[str]) -> str | None:
    """Why it cannot be called with that many positional arguments behind `self`, or None."""
    if isinstance(node, ast.AsyncFunctionDef):
        return f"{node.name} is asynchronous; it is called like any other"
    decorators = [ast.unparse(d) for d in node.decorator_list]
    if "property" in decorators:
        return f"{node.name} is a property; it is called"
    if decorators and not set(decorators) <= {"staticmethod", "classmethod"}:
        return None
    arguments = node.args
    count = len(wanted) + (0 if "staticmethod" in decorators else 1)
    most = len(arguments.posonlyargs) + len(arguments.args)
    keywords = [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    if keywords:
        return f"{node.name} needs the keyword {keywords[0]}, which it is not given"
    if _required_count(node) <= count and (count <= most or arguments.vararg is not None):
        return None
    takes = ", ".join(a.arg for a in (*arguments.posonlyargs, *arguments.args))
    return f"{node.name}({takes}) is called with {', '.join(wanted) or 'nothing'}"


def _required_count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    return len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)


def _shown(path: Path, project: Project) -> str:
    return path.relative_to(project.folder).as_posix() if path.is_relative_to(project.folder) else str(path)


def _error(name: str, message: str, action: str) -> Check:
    return Check(name, CheckState.ERROR, message, action)
