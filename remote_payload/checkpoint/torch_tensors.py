"""Tensors straight from the file to a device, without torch.load."""

from __future__ import annotations

import ctypes
import threading
import warnings
from typing import TYPE_CHECKING, Union

from remote_payload.checkpoint.errors import UnsupportedCheckpointError
from remote_payload.checkpoint.header import CheckpointHeader, TensorEntry, TensorPiece
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.tensor_bytes import (
    MAX_BLOCK_BYTES,
    MappedTensor,
    map_tensor,
    pieces_are_flat,
    readable,
)

if TYPE_CHECKING:
    import torch

_MAX_EXPANDED_BYTES = 1024 * 1024 * 1024
_WARNING_FILTERS = threading.Lock()
"""`warnings.catch_warnings` swaps process-wide state."""


def load_tensor(
    header: CheckpointHeader, name: str, device: Union[str, torch.device] = "cpu", *, copy: bool = True
) -> torch.Tensor:
    """One tensor on `device`, with the shape that it was saved with, and the strides if it is dense.

    It is read by position, so a file that is cut short meanwhile is an error; another device gets it block by block
    through bounded host memory. With `copy=False` a tensor in one place is, on the CPU, the mapped file itself: it must
    not be written to, and a file that is cut short ends the process (`map_tensor`). Raises `KeyError`,
    `CheckpointError`, and `UnsupportedCheckpointError` for a type that this torch does not have.
    """
    import torch

    tensor = readable(header, name)
    target = torch.device(device)
    swap = header.byte_order == "big"
    if not copy and target.type == "cpu" and not swap and not tensor.pieces:
        return tensor_from_map(map_tensor(header, name))
    dtype = torch_dtype(tensor.dtype)
    _check_size(header, tensor, dtype)
    if not tensor.pieces:
        part = TensorPiece((), tensor.shape, tensor.stride, tensor.file, tensor.file_offset or 0, tensor.span_bytes)
        loaded = _load_part(header, part, dtype, target, swap)
        return loaded if tensor.is_dense else loaded.contiguous()
    whole = torch.empty(tensor.shape, dtype=dtype, device=target)
    target_view = whole.view(-1) if pieces_are_flat(tensor) else whole
    for piece in tensor.pieces:
        box = tuple(slice(start, start + extent) for start, extent in zip(piece.offsets, piece.shape))
        target_view[box].copy_(_load_part(header, piece, dtype, target, swap))
    return whole


def _check_size(header: CheckpointHeader, tensor: TensorEntry, dtype: torch.dtype) -> None:
    """A view with a stride of 0 can claim any size; what no file of this size could fill is not made."""
    if tensor.numel * dtype.itemsize > max(header.size_bytes, _MAX_EXPANDED_BYTES):
        raise UnsupportedCheckpointError(
            f"tensor {tensor.name[:200]!r} is a view that repeats {tensor.span_bytes} bytes {tensor.numel} times"
        )


def _load_part(
    header: CheckpointHeader, part: TensorPiece, dtype: torch.dtype, device: torch.device, swap: bool
) -> torch.Tensor:
    import torch

    if part.span_bytes == 0:
        try:
            return torch.empty(part.shape, dtype=dtype, device=device)
        except RuntimeError as error:
            # Beside an extent of 0, the others may claim more than strides can count.
            raise UnsupportedCheckpointError(f"torch cannot make a tensor of shape {part.shape}: {error}") from error
    data = torch.empty(part.span_bytes, dtype=torch.uint8, device=device)
    on_cpu = device.type == "cpu"
    staging = data if on_cpu else torch.empty(min(part.span_bytes, MAX_BLOCK_BYTES), dtype=torch.uint8)
    with Source(header.files[part.file].path) as source:
        for at in range(0, part.span_bytes, len(staging)):
            block = staging[: min(len(staging), part.span_bytes - at)]
            source.read_into(part.file_offset + at, memory_of(block))
            if not on_cpu:
                # Returns when the copy is done, since the staging memory is not pinned.
                data[at : at + len(block)].copy_(block)
    flat = data.view(dtype)
    tensor = flat.as_strided(part.shape, part.stride)
    return _swapped(tensor) if swap else tensor


def memory_of(block: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the CPU that is not empty, to be read into."""
    return memoryview((ctypes.c_char * len(block)).from_address(block.data_ptr())).cast("B")


def torch_dtype(name: str) -> torch.dtype:
    """torch's type of that name. Raises `UnsupportedCheckpointError`."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedCheckpointError(f"torch {torch.__version__} has no element type {name}")
    return dtype


def tensor_from_map(mapped: MappedTensor) -> torch.Tensor:
    """A view of the mapped bytes in the file's byte order; it keeps the map alive."""
    import torch

    dtype = torch_dtype(mapped.dtype)
    if mapped.span_bytes == 0:
        return torch.empty(mapped.shape, dtype=dtype)
    count = mapped.span_bytes // dtype.itemsize
    with _WARNING_FILTERS, warnings.catch_warnings():
        # torch warns that the buffer is read-only, which is what we want it to be.
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.frombuffer(mapped.data, dtype=dtype, count=count, offset=mapped.offset)
    return flat.as_strided(mapped.shape, mapped.stride)


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    plain = tensor.contiguous()
    width = plain.element_size() // (2 if plain.is_complex() else 1)
    swapped = plain.reshape(-1).view(torch.uint8).reshape(-1, width).flip(1).contiguous()
    return swapped.view(plain.dtype).reshape(plain.shape)
