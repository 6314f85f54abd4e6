"""Where each tensor's bytes lie, and whether the file can hold what the pickle claims."""

from __future__ import annotations

import dataclasses
from typing import Optional

from remote_payload.checkpoint.dtypes import item_bytes
from remote_payload.checkpoint.inert import StorageRef, TensorRef
from remote_payload.checkpoint.records import RawCheckpoint, Record, integrity_problem
from remote_payload.wire.results import Finding


@dataclasses.dataclass(frozen=True)
class Placement:
    """`file_offset` is that of the first element, None with the reason in `unreadable`."""

    file: int = 0
    file_offset: Optional[int] = None
    span_bytes: int = 0
    unreadable: Optional[str] = None
    pieces: tuple[tuple[tuple[int, ...], TensorRef, Placement], ...] = ()
    """Offsets, tensor and place of each piece of a tensor that has several."""


def span_elements(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to behind the last that a view reaches."""
    if 0 in shape:
        return 0
    return 1 + sum((extent - 1) * step for extent, step in zip(shape, stride))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a view touches every element of its span exactly once, in whatever order of dimensions."""
    expected = 1
    for step, extent in sorted((s, n) for s, n in zip(stride, shape) if n != 1):
        if extent == 0:
            return True
        if step != expected:
            return False
        expected *= extent
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a row-major tensor."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(1, extent)
    return tuple(reversed(strides))


class Placer:
    """Places tensors one by one and collects what does not fit."""

    def __init__(self, raw: RawCheckpoint) -> None:
        self._raw = raw
        self._directory_lost = raw.directory_lost
        self._checked: dict[tuple[str, str, int], Optional[str]] = {}
        self._wrong_size: list[tuple[str, int, int]] = []
        self._absent: list[str] = []
        self._outside: list[tuple[str, int, int]] = []
        self._needed: dict[str, int] = {}

    def place(self, name: str, tensor: TensorRef) -> Placement:
        """Where `tensor` is. `name` stands in the findings."""
        if tensor.pieces:
            return self._place_pieces(name, tensor)
        storage, width = tensor.storage, item_bytes(tensor.dtype)
        if storage is None:
            return Placement(unreadable="a meta tensor: it has no values")
        if width is None:
            return Placement(unreadable=f"unknown element type {tensor.dtype}")
        reach = (tensor.offset + span_elements(tensor.shape, tensor.stride)) * width if 0 not in tensor.shape else 0
        storage_bytes = storage.numel * (item_bytes(storage.dtype) or 1)
        self._needed[storage.key] = max(self._needed.get(storage.key, 0), storage_bytes)
        record = self._raw.storages.get(storage.key)
        reason = self._check_storage(name, storage, storage_bytes, record)
        if reason is None and reach > storage_bytes:
            self._outside.append((name, reach, storage_bytes))
            reason = "a view beyond its storage"
        if record is None or reason is not None:
            return Placement(unreadable=reason or "no record")
        if reach > record.size:
            return Placement(unreadable="its record is too short")
        span = span_elements(tensor.shape, tensor.stride) * width
        return Placement(record.file, record.offset + tensor.offset * width, span)

    def _place_pieces(self, name: str, tensor: TensorRef) -> Placement:
        placed = []
        for offsets, piece in tensor.pieces:
            placement = self.place(name, piece)
            if placement.file_offset is None:
                return Placement(unreadable=f"its piece at {list(offsets)}: {placement.unreadable}")
            placed.append((offsets, piece, placement))
        span = sum(p.span_bytes for _, _, p in placed)
        return Placement(span_bytes=span, unreadable=f"it lies in {len(placed)} pieces", pieces=tuple(placed))

    def problems(self) -> list[Finding]:
        """What did not fit, the reader's own problems first."""
        found = [self._with_need(p) for p in self._raw.problems]
        if self._wrong_size:
            found.append(
                integrity_problem(
                    "integrity.record_size",
                    f"{len(self._wrong_size)} records have not the size that their tensors need",
                    tuple(name for name, _, _ in self._wrong_size),
                    {
                        "records": [
                            {"tensor": n, "record_bytes": r, "expected_bytes": e} for n, r, e in self._wrong_size[:20]
                        ]
                    },
                    "Number of elements times element size, from the pickle, differs from the record in the archive.",
                )
            )
        if self._absent:
            found.append(
                integrity_problem(
                    "integrity.record_missing",
                    f"{len(self._absent)} tensors have no record",
                    tuple(self._absent),
                    {"tensors": len(self._absent)},
                    "The pickle names storages that the file does not hold.",
                )
            )
        if self._outside:
            found.append(
                integrity_problem(
                    "integrity.view_outside",
                    f"{len(self._outside)} tensors reach beyond their storage",
                    tuple(name for name, _, _ in self._outside),
                    {"views": [{"tensor": n, "needs_bytes": r, "storage_bytes": s} for n, r, s in self._outside[:20]]},
                    "Offset, shape and strides point behind the storage's end: a forged or damaged pickle.",
                )
            )
        return found

    def _with_need(self, problem: Finding) -> Finding:
        if problem.id != "integrity.truncated" or not self._directory_lost:
            return problem
        needed = sum(self._needed.values())
        return dataclasses.replace(problem, evidence={**problem.evidence, "tensors_need_bytes": needed})

    def _check_storage(
        self, name: str, storage: StorageRef, storage_bytes: int, record: Optional[Record]
    ) -> Optional[str]:
        key = (storage.key, storage.dtype, storage.numel)
        if key not in self._checked:
            self._checked[key] = self._judge_storage(name, storage_bytes, record)
        return self._checked[key]

    def _judge_storage(self, name: str, storage_bytes: int, record: Optional[Record]) -> Optional[str]:
        if record is None:
            if self._directory_lost:
                return "the file ends before its directory"
            if not self._raw.problems or self._raw.format == "torch_zip":
                self._absent.append(name)
            return "no record of its storage can be read"
        if not record.readable:
            return "its record is packed or misplaced"
        if record.size != storage_bytes:
            self._wrong_size.append((name, record.size, storage_bytes))
            return "its record has the wrong size"
        return None
