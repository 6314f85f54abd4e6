"""Tensors straight from the mapped file to a device, without torch.load."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING, Union

from remote_payload.checkpoint.errors import UnsupportedCheckpointError
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.tensor_bytes import MappedTensor, map_tensor

if TYPE_CHECKING:
    import torch

_WARNING_FILTERS = threading.Lock()
"""`warnings.catch_warnings` swaps process-wide state."""


def load_tensor(
    header: CheckpointHeader, name: str, device: Union[str, torch.device] = "cpu", *, copy: bool = True
) -> torch.Tensor:
    """One tensor on `device`, with the shape that it was saved with, and the strides if it is dense.

    On the CPU it is a copy; with `copy=False` it is the mapped file itself, which must not be written to. Raises
    `KeyError`, `CheckpointError`, and `UnsupportedCheckpointError` for a type that this torch does not have.
    """
    mapped = map_tensor(header, name)
    tensor = tensor_from_map(mapped)
    if mapped.byte_order == "big":
        tensor = _swapped(tensor)
    moved = tensor.to(device)
    return moved.clone() if copy and moved.device.type == "cpu" else moved


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
