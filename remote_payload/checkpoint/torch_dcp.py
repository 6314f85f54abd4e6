"""Folders of torch.distributed.checkpoint, as FSDP2 and Lightning's sharded strategy write them.

`.metadata` names items; each is a complete torch file (a zip) somewhere inside a `.distcp` file. A tensor that several
ranks saved has one item for each box of it; here it is one tensor of several pieces.
"""

from __future__ import annotations

import os
from typing import Any, Optional

from remote_payload.checkpoint.dcp_metadata import Chunk, SavedTensor, Span, parse_metadata
from remote_payload.checkpoint.errors import (
    CheckpointError,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
)
from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.parts import Parts, path_inside, reason, refuse_link_out
from remote_payload.checkpoint.placement import contiguous_stride
from remote_payload.checkpoint.records import Folder, RawCheckpoint, integrity_problem
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.tiling import is_grid
from remote_payload.checkpoint.unpickle import unpickle

METADATA_NAME = ".metadata"
_LIGHTNING_META = "meta.pt"
_MAX_REASONS = 10


class TorchDcpReader:
    """Reads the metadata, and the few hundred bytes around each item that say how its tensor lies."""

    def recognises(self, folder: Folder) -> bool:
        return METADATA_NAME in folder.names

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        path = os.path.join(folder.path, METADATA_NAME)
        refuse_link_out(folder.path, METADATA_NAME)
        with Parts(folder.path, "torch_dcp", limits) as parts, Source(path) as source:
            unpickled = unpickle(parts.read_pickle(source), parts.limits)
            parts.charge(unpickled.symbols, unpickled.cost)
            metadata = parse_metadata(unpickled.value, limits)
            parts.raw.format_version = metadata.version
            for file in sorted({span.file for span in metadata.spans}):
                path_inside(folder.path, file, links_may_leave=False)
            items = _Items(parts)
            leaves = {name: items.read(name, item) for name, item in metadata.items.items()}
            items.report()
            root = _nested(leaves, metadata.paths)
            if _LIGHTNING_META in folder.names:
                _add_lightning_values(root, parts)
            return parts.finish(_unwrapped(root, parts.raw))


class _Items:
    """Reads items and collects what is wrong with them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._known: dict[Span, object] = {}
        self._lost: dict[str, str] = {}
        self._truncated: list[str] = []
        self._not_covered: list[str] = []
        self._mismatched: list[str] = []

    def read(self, name: str, item: Any) -> object:
        if isinstance(item, SavedTensor):
            return self._tensor(name, item)
        try:
            return self._at(item.span)
        except CheckpointError as error:
            self._note(name, error)
            return f"<unreadable: {error.kind}>"

    def report(self) -> None:
        problems = self._parts.raw.problems
        for finding_id, names, words, explanation in (
            ("integrity.truncated", self._truncated, "lie beyond the end of their file", "The metadata places them "
             "behind the last byte, or their file is missing."),
            ("integrity.record_missing", list(self._lost), "cannot be read", "What lies at the place that the "
             "metadata gives is no torch file."),
            ("integrity.shard_mismatch", self._mismatched, "are not what the metadata says", "Shape or type in the "
             "item differ from the metadata: one of them comes from another save."),
            ("integrity.shard_incomplete", self._not_covered, "have chunks that do not cover them", "The chunks leave "
             "gaps or overlap, so the tensor cannot be put together."),
        ):  # fmt: skip
            if names:
                evidence: dict[str, Any] = {"items": len(names)}
                if finding_id == "integrity.record_missing":
                    evidence["reasons"] = dict(list(self._lost.items())[:_MAX_REASONS])
                where = tuple(n[:200] for n in names)
                problems.append(
                    integrity_problem(finding_id, f"{len(names)} saved items {words}", where, evidence, explanation)
                )

    def _tensor(self, name: str, saved: SavedTensor) -> TensorRef:
        whole = TensorRef(None, saved.dtype, 0, saved.shape, contiguous_stride(saved.shape))
        chunks = [c for c in saved.chunks if 0 not in c.shape] or list(saved.chunks[:1])
        if not is_grid(saved.shape, [(c.offsets, c.shape) for c in chunks]):
            self._not_covered.append(name)
            whole.storage = self._parts.missing_storage(saved.dtype, 0)
            return whole
        pieces = tuple((c.offsets, self._chunk(name, saved.dtype, c)) for c in sorted(chunks, key=lambda c: c.offsets))
        if len(pieces) == 1:
            return pieces[0][1]
        whole.pieces = pieces
        return whole

    def _chunk(self, name: str, dtype: str, chunk: Chunk) -> TensorRef:
        try:
            found = self._at(chunk.span)
        except CheckpointError as error:
            self._note(name, error)
            found = None
        if isinstance(found, TensorRef) and (found.shape, found.dtype) == (chunk.shape, dtype):
            return found
        if found is not None:
            self._mismatched.append(name)
        return TensorRef(self._parts.missing_storage(dtype, 0), dtype, 0, chunk.shape, contiguous_stride(chunk.shape))

    def _at(self, span: Optional[Span]) -> object:
        if span is None:
            raise TruncatedCheckpointError("the metadata does not say where it lies")
        if span.transformed:
            raise UnsupportedCheckpointError("its bytes were transformed by an extension of the writer")
        if span not in self._known:
            self._known[span] = self._parts.read_span(span.file, span.offset, span.length)
        return self._known[span]

    def _note(self, name: str, error: CheckpointError) -> None:
        if isinstance(error, TruncatedCheckpointError):
            self._truncated.append(name)
        else:
            self._lost[name[:200]] = reason(error) if len(self._lost) < _MAX_REASONS else ""


def _nested(leaves: dict[str, object], paths: dict[str, tuple[Any, ...]]) -> dict[Any, Any]:
    """The state dict as it was before it was flattened."""
    root: dict[Any, Any] = {}
    inner: dict[int, dict[Any, Any]] = {id(root): root}
    for name, leaf in leaves.items():
        at = root
        path = paths.get(name, (name,))
        for part in path[:-1]:
            below = at.setdefault(part, {})
            if not isinstance(below, dict) or (below and id(below) not in inner):
                at, path = root, (name,)
                break
            inner[id(below)] = below
            at = below
        at[path[-1] if path[-1] not in at else name] = leaf
    # The innermost first: a list takes its parts as they are by then.
    for container in reversed(list(inner.values())):
        for key, value in container.items():
            if id(value) in inner and _is_list(value):
                container[key] = [value[i] for i in range(len(value))]
    return root


def _is_list(value: dict[Any, Any]) -> bool:
    """Whether its keys are what flattening leaves of a list."""
    return bool(value) and all(type(k) is int for k in value) and set(value) == set(range(len(value)))


def _add_lightning_values(root: dict[Any, Any], parts: Parts) -> None:
    """Lightning keeps epoch, step, hyper-parameters and callbacks in a torch file beside the shards."""
    try:
        extra = parts.read(_LIGHTNING_META)
    except CheckpointError as error:
        parts.raw.problems.append(
            integrity_problem(
                "integrity.shard_incomplete",
                f"{_LIGHTNING_META} cannot be read",
                (_LIGHTNING_META,),
                {"reason": reason(error)},
                "It holds epoch, step and hyper-parameters; the tensors do not depend on it.",
            )
        )
        return
    if isinstance(extra, dict):
        for key, value in extra.items():
            root.setdefault(key, value)


def _unwrapped(root: dict[Any, Any], raw: RawCheckpoint) -> dict[Any, Any]:
    """What stands alone under one key (`app` in torch's own examples) is the state dict."""
    if len(root) == 1:
        key, value = next(iter(root.items()))
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            raw.notes.append(f"Everything lies under the key {str(key)[:100]!r}; it is left out of the names.")
            return value
    return root
