"""A tensor's raw bytes: in bounded blocks by position, or mapped."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator

from remote_payload.checkpoint.errors import (
    CheckpointError,
    MalformedCheckpointError,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
)
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry
from remote_payload.checkpoint.placement import contiguous_stride
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.tiling import is_in_row_order

MAX_BLOCK_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class MappedTensor:
    """A tensor's span in a read-only map: its first element is at `offset` of `data`. Strides are in elements."""

    data: mmap.mmap
    offset: int
    span_bytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    byte_order: str


def iter_tensor_bytes(header: CheckpointHeader, name: str, block_bytes: int = 8 * 1024 * 1024) -> Iterator[bytes]:
    """The span of a tensor in blocks, in the file's byte order: for a dense tensor exactly its elements.

    Raises `KeyError` for an unknown name, `CheckpointError` for a tensor whose bytes are not there, and
    `UnsupportedCheckpointError` for one whose pieces, one after the other, are not its elements in row-major order.
    """
    tensor = readable(header, name)
    step = max(1, min(block_bytes, MAX_BLOCK_BYTES))
    for file, start, length in _spans(tensor):
        with Source(header.files[file].path) as source:
            for at in range(start, start + length, step):
                yield source.read(at, min(step, start + length - at))


def map_tensor(header: CheckpointHeader, name: str) -> MappedTensor:
    """The tensor's span of the file, mapped read-only; pages are file-backed and cost no memory of the process.

    Raises `KeyError` and `CheckpointError` as `iter_tensor_bytes`; a tensor in pieces cannot be mapped. A file whose
    size is no longer what the header says is refused. The map stays valid as long as it is referenced, but a file that
    is cut short while it is mapped ends the process that touches the lost part (SIGBUS): map only files that nobody
    writes to, and read by position (`iter_tensor_bytes`, `load_tensor`) otherwise.
    """
    tensor = readable(header, name)
    if tensor.file_offset is None:
        raise UnsupportedCheckpointError(
            f"tensor {name[:200]!r} lies in {len(tensor.pieces)} pieces: it has no one map"
        )
    file = header.files[tensor.file]
    start = tensor.file_offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    inset = tensor.file_offset - start
    with Source(file.path) as source:
        if source.size != file.size:
            raise TruncatedCheckpointError(
                f"{file.path} went from {file.size} to {source.size} bytes since its header was read"
            )
        try:
            data = source.map(start, max(1, inset + tensor.span_bytes))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file.path} cannot be mapped: {error}") from error
    return MappedTensor(data, inset, tensor.span_bytes, tensor.dtype, tensor.shape, tensor.stride, header.byte_order)


def readable(header: CheckpointHeader, name: str) -> TensorEntry:
    """The entry of a tensor whose bytes are there. Raises `KeyError`, `MalformedCheckpointError`."""
    tensor = header.tensor(name)
    if not tensor.is_readable:
        raise MalformedCheckpointError(f"tensor {name[:200]!r} cannot be read: {tensor.unreadable}")
    return tensor


def pieces_are_flat(tensor: TensorEntry) -> bool:
    """Whether a tensor's pieces are ranges of its elements in row-major order, cut without regard to its rows."""
    at = 0
    for piece in tensor.pieces:
        if len(piece.shape) != 1 or piece.offsets != (at,) or piece.stride != (1,):
            return False
        at += piece.shape[0]
    return at == tensor.numel and tensor.stride == contiguous_stride(tensor.shape)


def pieces_are_row_ranges(tensor: TensorEntry) -> bool:
    """Whether a tensor's pieces, one after the other, are its elements in row-major order."""
    if pieces_are_flat(tensor):
        return True
    if any(len(p.shape) != len(tensor.shape) for p in tensor.pieces):
        return False
    in_order = is_in_row_order(tensor.shape, [(p.offsets, p.shape) for p in tensor.pieces])
    return in_order and all(p.stride == contiguous_stride(p.shape) for p in tensor.pieces)


def _spans(tensor: TensorEntry) -> list[tuple[int, int, int]]:
    """File, offset and length of what is read one after the other."""
    if tensor.file_offset is not None:
        return [(tensor.file, tensor.file_offset, tensor.span_bytes)]
    if not pieces_are_row_ranges(tensor):
        raise UnsupportedCheckpointError(f"the pieces of tensor {tensor.name[:200]!r} are not its rows in their order")
    return [(p.file, p.file_offset, p.span_bytes) for p in tensor.pieces]
