"""The one entry: a path to a header, or a `CheckpointError`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Union

from remote_payload.checkpoint.build import build_header
from remote_payload.checkpoint.errors import CheckpointIsDirectoryError, NotACheckpointError, UnsupportedCheckpointError
from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Limits
from remote_payload.checkpoint.plain_pickle import PlainPickleReader
from remote_payload.checkpoint.records import FormatReader, RawCheckpoint
from remote_payload.checkpoint.safetensors import INDEX_SUFFIX, SafetensorsReader, find_index, read_index
from remote_payload.checkpoint.single_values import SingleValues
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.torch_legacy import TorchLegacyReader
from remote_payload.checkpoint.torch_zip import TorchZipReader

_HEAD_BYTES = 512
_READERS: tuple[FormatReader, ...] = (TorchZipReader(), TorchLegacyReader(), SafetensorsReader(), PlainPickleReader())


def read_header(path: Union[str, os.PathLike[str]], *, limits: Limits = DEFAULT_LIMITS) -> CheckpointHeader:
    """All facts of a checkpoint's header. Nothing is executed and nothing that the file names is imported.

    `path` is a file, the index file of a sharded safetensors checkpoint, or a folder with one of these. Damage that
    leaves the facts readable is in `problems`; raises `CheckpointError` otherwise.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        name = _inside_folder(name)
    with Source(name) as source:
        fingerprint = source.fingerprint()
        raw = read_index(name, limits) if name.endswith(INDEX_SUFFIX) else _read_file(source, limits)
        with ExitStack() as stack:
            sources = [source] if len(raw.files) == 1 and raw.files[0].path == name else []
            sources = sources or [stack.enter_context(Source(f.path)) for f in raw.files]
            values = SingleValues(lambda f, o, n: sources[f].read(o, n), raw.byte_order, limits.single_values)
            return build_header(name, raw, fingerprint, values, limits)


def _inside_folder(folder: str) -> str:
    found = find_index(folder)
    if found is None:
        raise CheckpointIsDirectoryError(
            f"{folder} is a folder, and holds neither one safetensors file nor an index of shards"
        )
    return found


def _read_file(source: Source, limits: Limits) -> RawCheckpoint:
    if source.size == 0:
        raise NotACheckpointError(f"{source.path} is empty")
    head = source.read(0, min(source.size, _HEAD_BYTES))
    for reader in _READERS:
        if reader.recognises(head):
            return reader.read(source, limits)
    if head[257:262] == b"ustar":
        raise UnsupportedCheckpointError(f"{source.path} is a tar archive, as torch wrote before 0.1.10")
    raise NotACheckpointError(f"{source.path} is neither a torch file, safetensors nor a pickle")
