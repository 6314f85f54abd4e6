"""A tensor's raw bytes: in bounded blocks by position, or mapped."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator

from remote_payload.checkpoint.errors import CheckpointError, MalformedCheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry
from remote_payload.checkpoint.source import Source

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

    Raises `KeyError` for an unknown name and `CheckpointError` for a tensor whose bytes are not there.
    """
    tensor = _readable(header, name)
    step = min(block_bytes, MAX_BLOCK_BYTES)
    start = tensor.file_offset or 0
    with Source(header.files[tensor.file].path) as source:
        for at in range(start, start + tensor.span_bytes, step):
            yield source.read(at, min(step, start + tensor.span_bytes - at))


def map_tensor(header: CheckpointHeader, name: str) -> MappedTensor:
    """The tensor's span of the file, mapped read-only; pages are file-backed and cost no memory of the process.

    Raises `KeyError` and `CheckpointError` as `iter_tensor_bytes`. The map stays valid as long as it is referenced. A
    file that is cut short while it is mapped ends the process that touches the lost part (SIGBUS).
    """
    tensor = _readable(header, name)
    file = header.files[tensor.file]
    start = (tensor.file_offset or 0) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    inset = (tensor.file_offset or 0) - start
    with open(file.path, "rb") as opened:
        if opened.seek(0, 2) < start + inset + tensor.span_bytes:
            raise TruncatedCheckpointError(f"{file.path} became shorter since its header was read")
        try:
            data = mmap.mmap(opened.fileno(), max(1, inset + tensor.span_bytes), access=mmap.ACCESS_READ, offset=start)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file.path} cannot be mapped: {error}") from error
    return MappedTensor(data, inset, tensor.span_bytes, tensor.dtype, tensor.shape, tensor.stride, header.byte_order)


def _readable(header: CheckpointHeader, name: str) -> TensorEntry:
    tensor = header.tensor(name)
    if tensor.file_offset is None:
        raise MalformedCheckpointError(f"tensor {name[:200]!r} cannot be read: {tensor.unreadable}")
    return tensor
