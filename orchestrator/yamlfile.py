"""YAML files that people write: read safely, and refused with file, line and field."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from orchestrator.errors import ConfigurationError

MAX_FILE_BYTES = 4 * 1024 * 1024
M = TypeVar("M", bound=pydantic.BaseModel)
_FieldPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class YamlDocument:
    """A mapping read from `path`, with the line on which each field stands."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[_FieldPath, int]

    def where(self, *field: str | int) -> str:
        """`file:line: field 'a.b'`, by the nearest enclosing field whose line is known."""
        known = next((field[:n] for n in range(len(field), 0, -1) if field[:n] in self.lines), ())
        line = self.lines.get(known, 1)
        name = ".".join(str(part) for part in field)
        return f"{self.path}:{line}: field '{name}'" if name else f"{self.path}:{line}"


def load_yaml(path: Path) -> YamlDocument:
    """Read a YAML mapping with the safe loader; an empty file is an empty mapping. Raises `ConfigurationError`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_FILE_BYTES} bytes, which no configuration needs")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", action="Check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text", action="Save it as UTF-8.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigurationError(f"{path}{line}: not valid YAML: {problem}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigurationError(f"{path}:1: expected fields (`name: value`), found {type(data).__name__}")
    lines: dict[_FieldPath, int] = {}
    if node is not None:
        _collect_lines(node, (), lines, depth=0)
    return YamlDocument(path, data, lines)


def validate(model: type[M], data: Mapping[str, Any], document: YamlDocument, *at: str) -> M:
    """Check `data`, which stands under the field `at` of `document`; the first problem becomes the message."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        field = (*at, *first["loc"])
        message = first["msg"]
        action = ""
        if first["type"] == "extra_forbidden":
            message = "unknown key"
            nearest = difflib.get_close_matches(str(field[-1]), _field_names(model, first["loc"][:-1]), n=1)
            action = f"Did you mean '{nearest[0]}'?" if nearest else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigurationError(f"{document.where(*field)}: {message}{more}", action=action) from None


def _field_names(model: type[pydantic.BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    for part in loc:
        by_name = {f.alias or n: f for n, f in model.model_fields.items()}
        annotation = by_name[str(part)].annotation if str(part) in by_name else None
        if not (isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)):
            return []
        model = annotation
    return [f.alias or name for name, f in model.model_fields.items()]


def _collect_lines(node: yaml.Node, at: _FieldPath, lines: dict[_FieldPath, int], depth: int) -> None:
    if depth > 20:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = (*at, str(key.value))
            lines[field] = key.start_mark.line + 1
            _collect_lines(value, field, lines, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item: _FieldPath = (*at, index)
            lines[item] = value.start_mark.line + 1
            _collect_lines(value, item, lines, depth + 1)
