"""torch.distributed.checkpoint's `.metadata`: what was saved, in which chunks, and where each of them lies."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from remote_payload.checkpoint.errors import MalformedCheckpointError
from remote_payload.checkpoint.inert import Opaque, Symbol
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.trust import named_dtype

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MAX_DIMENSIONS = 64
_MAX_EXTENT = 1 << 62
_MAX_PATH_PARTS = 64

Extents = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Span:
    """Where an item lies. `transformed` says that an extension packed its bytes."""

    file: str
    offset: int
    length: int
    transformed: bool


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and its span; None if the metadata does not say where it is."""

    offsets: Extents
    shape: Extents
    span: Optional[Span]


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    dtype: str
    shape: Extents
    chunks: tuple[Chunk, ...]


@dataclasses.dataclass(frozen=True)
class SavedObject:
    """Anything but a tensor, pickled by torch.save."""

    span: Optional[Span]


@dataclasses.dataclass(frozen=True)
class DcpMetadata:
    """`paths` says where in the nested state dict each item was before it was flattened."""

    items: dict[str, Any]
    spans: frozenset[Span]
    paths: dict[str, tuple[Any, ...]]
    version: Optional[str]


def parse_metadata(root: object, limits: Limits) -> DcpMetadata:
    """The metadata out of a pickle's tree. Raises `MalformedCheckpointError` for any other tree."""
    fields = _state(root, _METADATA, "Metadata")
    described, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise MalformedCheckpointError("the metadata does not say what was saved and where")
    spans = _spans(stored)
    budget = _Budget(limits.tensors)
    items = {name: _item(name, value, spans, budget) for name, value in described.items() if isinstance(name, str)}
    if len(items) != len(described) or len(items) > limits.tensors:
        raise MalformedCheckpointError("the metadata's names are no text, or too many")
    version = fields.get("version")
    paths = fields.get("planner_data")
    return DcpMetadata(
        items,
        frozenset(spans.values()),
        {n: p for n, p in paths.items() if isinstance(n, str) and _is_path(p)} if isinstance(paths, dict) else {},
        version[:40] if isinstance(version, str) else None,
    )


class _Budget:
    """All chunks together: a few bytes of metadata can name one chunk list again and again."""

    def __init__(self, chunks: int) -> None:
        self._left = chunks

    def take(self, chunks: int) -> None:
        self._left -= chunks
        if self._left < 0:
            raise MalformedCheckpointError("the metadata has chunks beyond all measure")


def _item(name: str, value: object, spans: dict[Any, Span], budget: _Budget) -> Any:
    if _is(value, _METADATA, "BytesStorageMetadata"):
        budget.take(1)
        return SavedObject(spans.get((name, None)))
    fields = _state(value, _METADATA, "TensorStorageMetadata")
    shape, chunks = _extents(fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list):
        raise MalformedCheckpointError(f"the metadata of {name[:200]!r} has no chunks")
    budget.take(1 + len(chunks))
    boxes: dict[Any, Chunk] = {}
    for chunk in chunks:
        parts = _state(chunk, _METADATA, "ChunkStorageMetadata")
        offsets, extents = _extents(parts.get("offsets")), _extents(parts.get("sizes"))
        # Ranks that hold the same box are listed each; its bytes are kept once.
        boxes.setdefault((offsets, extents), Chunk(offsets, extents, spans.get((name, offsets))))
    return SavedTensor(_dtype(fields.get("properties")), shape, tuple(boxes.values()))


def _dtype(properties: object) -> str:
    # The state is (dtype, layout, requires_grad, memory_format, pin_memory).
    state = properties.state if isinstance(properties, Opaque) else None
    symbol = state[0] if isinstance(state, tuple) and state else None
    return (named_dtype(symbol.module, symbol.name) if isinstance(symbol, Symbol) else None) or "unknown"


def _spans(stored: dict[Any, Any]) -> dict[Any, Span]:
    spans: dict[Any, Span] = {}
    for index, info in stored.items():
        key, place = _state(index, _METADATA, "MetadataIndex"), _state(info, _FILESYSTEM, "_StorageInfo")
        name, offsets = key.get("fqn"), key.get("offset")
        file, offset, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(name, str) or not isinstance(file, str):
            raise MalformedCheckpointError("an item's place in the metadata names no item or no file")
        span = Span(file, _size(offset), _size(length), bool(place.get("transform_descriptors")))
        spans[name, None if offsets is None else _extents(offsets)] = span
    _check_overlap(set(spans.values()))
    return spans


def _check_overlap(spans: set[Span]) -> None:
    """Two items may be the same span, never a part of each other: that would make work out of nothing."""
    file, reach = "", 0
    for span in sorted(spans, key=lambda s: (s.file, s.offset, s.length)):
        if span.file == file and span.offset < reach:
            raise MalformedCheckpointError(f"items of the metadata overlap in {span.file[:200]!r} at {span.offset}")
        file, reach = span.file, span.offset + span.length


def _is(value: object, module: str, name: str) -> bool:
    return isinstance(value, Opaque) and (value.symbol.module, value.symbol.name) == (module, name)


def _state(value: object, module: str, name: str) -> dict[Any, Any]:
    if isinstance(value, Opaque) and _is(value, module, name) and isinstance(value.state, dict):
        return value.state
    raise MalformedCheckpointError(f"the metadata holds something else where a {name} belongs")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_EXTENT


def _extents(value: object) -> Extents:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS or not all(_is_size(n) for n in value):
        raise MalformedCheckpointError("a shape in the metadata is no tuple of sizes")
    return tuple(value)


def _is_path(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and 0 < len(value) <= _MAX_PATH_PARTS
        and all(isinstance(part, str) or (type(part) is int and 0 <= part < 1 << 31) for part in value)
    )


def _size(value: object) -> int:
    if isinstance(value, int) and _is_size(value):
        return value
    raise MalformedCheckpointError("an item's place in the metadata is no offset and length")
