"""JSON documents that another machine wrote, read as data to distrust: bounded, finite, printable, never raising."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remote_payload.wire.names import printable

MAX_DOCUMENT_BYTES = 256 * 1024 * 1024
_MAX_TEXT = 4_000
_MAX_DEPTH = 24


def read_object(path: Path, label: str) -> tuple[dict[str, Any] | None, str | None]:
    """The JSON object in `path`, and what is wrong with the file; both None where there is no such file.

    NaN and Infinity become null, control characters become visible, lone surrogates are escaped.
    """
    try:
        if path.is_symlink() or not path.is_file():
            return None, None
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            return None, f"{label} is larger than {MAX_DOCUMENT_BYTES} bytes and was not read"
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
    except OSError as error:
        return None, f"{label} could not be read: {error.strerror}"
    except UnicodeDecodeError:
        return None, f"{label} is not UTF-8 text"
    except (ValueError, RecursionError):
        return None, f"{label} is not valid JSON"
    if not isinstance(value, dict):
        return None, f"{label} holds no JSON object"
    return clean(value), None


def clean(value: Any, depth: int = 0) -> Any:
    """`value` with printable, bounded texts; what is nested deeper than anybody writes by hand becomes null."""
    if isinstance(value, str):
        return printable(value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + " … (cut)")
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        return {clean(str(k)): clean(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v, depth + 1) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else clean(str(value))


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in `value` if it is a list, else none."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def texts(value: Any) -> list[str]:
    """The strings in `value` if it is a list, else none."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def text(value: Any) -> str | None:
    """`value` if it is a string that says something, else None."""
    return value if isinstance(value, str) and value.strip() else None


def number(value: Any) -> float | int | None:
    """`value` if it is a finite number, else None. A bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None


def integer(value: Any) -> int | None:
    """`value` if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _no_number(_name: str) -> None:
    return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None
