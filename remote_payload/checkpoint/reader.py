"""The one entry: a path to a header, or a `CheckpointError`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Callable, Optional, Union

from remote_payload.checkpoint.build import build_header
from remote_payload.checkpoint.errors import NotACheckpointError, UnreadableCheckpointError, UnsupportedCheckpointError
from remote_payload.checkpoint.folders import read_folder
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Limits
from remote_payload.checkpoint.plain_pickle import PlainPickleReader
from remote_payload.checkpoint.records import FormatReader, RawCheckpoint
from remote_payload.checkpoint.safetensors import INDEX_SUFFIX, SafetensorsReader, read_index
from remote_payload.checkpoint.single_values import SingleValues
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.torch_legacy import TorchLegacyReader
from remote_payload.checkpoint.torch_sharded import TORCH_INDEX_SUFFIX, read_torch_index
from remote_payload.checkpoint.torch_zip import TorchZipReader
from remote_payload.wire.chunks import Fingerprint
from remote_payload.wire.folders import folder_fingerprint

_HEAD_BYTES = 512
_READERS: tuple[FormatReader, ...] = (TorchZipReader(), TorchLegacyReader(), SafetensorsReader(), PlainPickleReader())


def read_header(
    path: Union[str, os.PathLike[str]],
    *,
    limits: Limits = DEFAULT_LIMITS,
    on_read: Optional[Callable[[int, int], None]] = None,
) -> CheckpointHeader:
    """All facts of a checkpoint's header. Nothing is executed and nothing that the file names is imported.

    `path` is a file, the index file of a sharded checkpoint, or a folder (`folders.py` lists the layouts). Damage that
    leaves the facts readable is in `problems`; raises `CheckpointError` otherwise. `on_read` is told (offset, length)
    of whatever is read of the file at `path`; of the files in a folder, or beside an index, it hears nothing.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        fingerprint = _folder_fingerprint(name)
        return _build(name, read_folder(name, limits), fingerprint, [], limits)
    with Source(name, on_read) as source:
        return _build(name, _read_file(source, limits), source.fingerprint(), [source], limits)


def _build(
    name: str, raw: RawCheckpoint, fingerprint: Fingerprint, opened: list[Source], limits: Limits
) -> CheckpointHeader:
    with ExitStack() as stack:
        known = {source.path: source for source in opened}

        def read_bytes(file: int, offset: int, length: int) -> bytes:
            path = raw.files[file].path
            if path not in known:
                known[path] = stack.enter_context(Source(path))
            return known[path].read(offset, length)

        values = SingleValues(read_bytes, raw.byte_order, limits.single_values)
        return build_header(name, raw, fingerprint, values, limits)


def _folder_fingerprint(folder: str) -> Fingerprint:
    try:
        return folder_fingerprint(folder)
    except (OSError, ValueError) as error:
        raise UnreadableCheckpointError(f"{folder} cannot be listed: {error}") from error


def _read_file(source: Source, limits: Limits) -> RawCheckpoint:
    if source.size == 0:
        raise NotACheckpointError(f"{source.path} is empty")
    if source.path.endswith(INDEX_SUFFIX):
        return read_index(source.path, limits)
    if source.path.endswith(TORCH_INDEX_SUFFIX):
        return read_torch_index(source.path, limits)
    head = source.read(0, min(source.size, _HEAD_BYTES))
    for reader in _READERS:
        if reader.recognises(head):
            return reader.read(source, limits)
    if head[257:262] == b"ustar":
        raise UnsupportedCheckpointError(f"{source.path} is a tar archive, as torch wrote before 0.1.10")
    raise NotACheckpointError(f"{source.path} is neither a torch file, safetensors nor a pickle")
