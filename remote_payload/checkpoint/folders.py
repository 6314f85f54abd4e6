"""Which checkpoint a folder holds. A folder that could be two is told by the first of the list, with a note."""

from __future__ import annotations

import os
from typing import Optional

from remote_payload.checkpoint.deepspeed import DeepSpeedReader
from remote_payload.checkpoint.errors import CheckpointIsDirectoryError, UnreadableCheckpointError
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.records import Folder, FolderReader, RawCheckpoint
from remote_payload.checkpoint.safetensors import INDEX_SUFFIX, SafetensorsReader, read_index
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.torch_dcp import TorchDcpReader
from remote_payload.checkpoint.torch_sharded import TORCH_INDEX_SUFFIX, read_torch_index
from remote_payload.checkpoint.torch_zip import TorchZipReader

_MAX_ENTRIES = 100_000


class _SafetensorsFolder:
    def recognises(self, folder: Folder) -> bool:
        return _only(folder.names, INDEX_SUFFIX) is not None or _only(folder.names, ".safetensors") is not None

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        index = _only(folder.names, INDEX_SUFFIX)
        if index is not None:
            return read_index(os.path.join(folder.path, index), limits)
        with Source(os.path.join(folder.path, _only(folder.names, ".safetensors") or "")) as source:
            return SafetensorsReader().read(source, limits)


class _TorchIndexFolder:
    def recognises(self, folder: Folder) -> bool:
        return _only(folder.names, TORCH_INDEX_SUFFIX) is not None

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        return read_torch_index(os.path.join(folder.path, _only(folder.names, TORCH_INDEX_SUFFIX) or ""), limits)


class _TorchFolder:
    """A model hub's folder with its weights in one torch file."""

    def recognises(self, folder: Folder) -> bool:
        return "pytorch_model.bin" in folder.names

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        with Source(os.path.join(folder.path, "pytorch_model.bin")) as source:
            return TorchZipReader().read(source, limits)


_READERS: tuple[tuple[str, FolderReader], ...] = (
    ("safetensors", _SafetensorsFolder()),
    ("torch.distributed.checkpoint", TorchDcpReader()),
    ("torch shards with an index", _TorchIndexFolder()),
    ("one torch file", _TorchFolder()),
    ("DeepSpeed", DeepSpeedReader()),
)


def read_folder(path: str, limits: Limits) -> RawCheckpoint:
    """The checkpoint in a folder. Raises `CheckpointError`."""
    folder = Folder(path, _names(path))
    found = [(label, reader) for label, reader in _READERS if reader.recognises(folder)]
    if not found:
        raise CheckpointIsDirectoryError(
            f"{path} is a folder, and holds no checkpoint in a layout that is known: neither one safetensors file, "
            "an index of shards, torch.distributed.checkpoint's .metadata, nor DeepSpeed's model states"
        )
    raw = found[0][1].read(folder, limits)
    for label, _ in found[1:]:
        raw.notes.append(f"The folder holds another checkpoint beside it, of {label}; it is not looked at.")
    return raw


def _names(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            names = frozenset(entry.name for entry, _ in zip(entries, range(_MAX_ENTRIES)))
    except OSError as error:
        raise UnreadableCheckpointError(f"{folder} cannot be listed: {error.strerror}") from error
    return names


def _only(names: frozenset[str], suffix: str) -> Optional[str]:
    """The one name that ends so; None if there is none or a choice."""
    found = [name for name in names if name.endswith(suffix)]
    return found[0] if len(found) == 1 else None
