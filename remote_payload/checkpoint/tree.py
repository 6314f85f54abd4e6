"""Walks over what a pickle made, without recursion, and finds the parts of a checkpoint in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Optional

from remote_payload.checkpoint.errors import MalformedCheckpointError
from remote_payload.checkpoint.inert import Opaque, TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.plain import key_text

Path = tuple[str, ...]

STATE_KEYS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "params", "weights")
AVERAGE_KEYS = ("ema_state_dict", "model_ema", "ema_model", "state_dict_ema", "ema", "model_averaged", "swa_state_dict")
_OPTIMIZER_KEY = re.compile(r"(^|[_.-])optim", re.IGNORECASE)
_MAX_OPTIMIZERS = 64
OPTIMIZER_KEYS = (
    "optimizer_state_dict",
    "optimizer",
    "optimizer_state",
    "optim",
    "optim_state",
    "optim_state_dict",
    "optimizers",
    "optimizer_states",
)
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


@dataclasses.dataclass(frozen=True)
class FoundState:
    """A state dict: entries by key as stored, where it was, and whether that place is one of the usual."""

    path: Path
    entries: dict[str, TensorRef]
    guessed: bool


def children(value: object) -> Iterator[tuple[str, object]]:
    """The named parts of a container or opaque object. A module's own bookkeeping does not show in the names."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key_text(key), item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield str(index), item
    elif isinstance(value, Opaque):
        if isinstance(value.state, dict) and any(p in value.state for p in _MODULE_PARTS):
            for part in _MODULE_PARTS:
                yield from children(value.state.get(part))
            return
        for part_of_object in (value.state, value.entries, value.items, value.arguments):
            yield from children(part_of_object)


def tensors_below(root: object, limits: Limits) -> Iterator[tuple[Path, TensorRef]]:
    """Every tensor with its path, in the file's order. A container that occurs twice is entered once."""
    if isinstance(root, TensorRef):
        yield (), root
        return
    seen = {id(root)}
    pending: list[tuple[Path, Iterator[tuple[str, object]]]] = [((), children(root))]
    found, characters = 0, 0
    while pending:
        path, rest = pending[-1]
        entry = next(rest, None)
        if entry is None:
            pending.pop()
            continue
        name, value = entry
        if isinstance(value, TensorRef):
            found += 1
            characters += len(name) + sum(map(len, path)) + len(path)
            if found > limits.tensors or characters > limits.name_characters:
                raise MalformedCheckpointError(f"more than {limits.tensors} tensors, or names beyond all measure")
            yield (*path, name), value
        elif isinstance(value, (dict, list, tuple, Opaque)) and id(value) not in seen:
            seen.add(id(value))
            if len(path) < 200:
                pending.append(((*path, name), children(value)))


def find_state(root: object, limits: Limits) -> Optional[FoundState]:
    """The model's weights: at a usual key, or the root itself, or the largest mapping of names to tensors."""
    usual = _descend(root, (), limits)
    if usual is not None:
        return usual
    best: Optional[tuple[int, Path, dict[str, TensorRef]]] = None
    groups: dict[Path, dict[str, TensorRef]] = {}
    for path, tensor in tensors_below(root, limits):
        if path and path[0] not in OPTIMIZER_KEYS:
            groups.setdefault(path[:-1], {})[path[-1]] = tensor
    for path, group in groups.items():
        if best is None or len(group) > best[0]:
            best = (len(group), path, group)
    if best is None:
        return None
    if isinstance(root, Opaque):
        entries = {".".join(p): t for p, t in tensors_below(root, limits)}
        return FoundState((), entries, True)
    return FoundState(best[1], best[2], True)


def find_average(root: object, limits: Limits) -> Optional[FoundState]:
    """A second copy of the weights beside the first, where there is one."""
    if not isinstance(root, dict):
        return None
    for key in AVERAGE_KEYS:
        if isinstance(root.get(key), dict):
            found = _descend(root[key], (key,), limits) or _flattened(root[key], (key,), limits)
            if found is not None:
                return found
    return None


def find_optimizers(root: object) -> list[tuple[Path, dict[Any, Any]]]:
    """The mappings with `state` and `param_groups` at the usual keys, then at others that speak of an optimizer."""
    if not isinstance(root, dict):
        return []
    others = [k for k in root if isinstance(k, str) and k not in OPTIMIZER_KEYS and _OPTIMIZER_KEY.search(k)]
    found: list[tuple[Path, dict[Any, Any]]] = []
    for key in (*OPTIMIZER_KEYS, *others):
        candidates: list[tuple[Path, object]] = [((key,), root.get(key))]
        for path, value in candidates:
            if len(found) >= _MAX_OPTIMIZERS:
                return found
            if isinstance(value, dict) and isinstance(value.get("state"), dict):
                found.append((path, value))
            elif len(path) == 1 and isinstance(value, (dict, list, tuple)):
                candidates.extend(((*path, name), item) for name, item in list(children(value))[:16])
    return found


def strip_prefixes(names: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Stored name → name without wrappers, and what was removed. Nothing is removed if names would then collide."""
    stripped = {name: name for name in names}
    removed: list[str] = []
    progress = True
    while progress:
        progress = False
        for prefix in WRAPPER_PREFIXES:
            if prefix == "module." and not all(n.startswith(prefix) for n in stripped.values()):
                # A submodule may well be called `module`; a wrapper is in front of every name.
                continue
            changed = {k: _without(n, prefix) for k, n in stripped.items()}
            if changed != stripped and len(set(changed.values())) == len(changed) and all(changed.values()):
                stripped, progress = changed, True
                removed.append(prefix)
    return stripped, tuple(dict.fromkeys(removed))


def _without(name: str, prefix: str) -> str:
    if name.startswith(prefix):
        return name[len(prefix) :]
    # torch.compile and the checkpoint wrapper also stand in the middle of a name.
    return name.replace(f".{prefix}", ".") if prefix.startswith("_") else name


def _descend(value: object, path: Path, limits: Limits) -> Optional[FoundState]:
    for _ in range(4):
        if not isinstance(value, dict):
            return None
        direct = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)}
        if direct and 2 * len(direct) >= len(value):
            return _flattened(value, path, limits)
        key = next((k for k in STATE_KEYS if _holds_tensors(value.get(k), limits)), None)
        if key is None:
            key = next((k for k in AVERAGE_KEYS if not path and _holds_tensors(value.get(k), limits)), None)
        if key is None:
            return _flattened(value, path, limits) if path else None
        value, path = value[key], (*path, key)
        if isinstance(value, Opaque):
            return _flattened(value, path, limits)
    return None


def _holds_tensors(value: object, limits: Limits) -> bool:
    if not isinstance(value, (dict, Opaque)):
        return False
    return next(iter(tensors_below(value, limits)), None) is not None


def _flattened(value: object, path: Path, limits: Limits) -> Optional[FoundState]:
    entries = {".".join(p): t for p, t in tensors_below(value, limits)}
    return FoundState(path, entries, False) if entries else None
