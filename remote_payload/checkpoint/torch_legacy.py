"""What torch.save wrote before 1.6, and on request since: four pickles, then every storage in turn."""

from __future__ import annotations

import struct

from remote_payload.checkpoint.dtypes import item_bytes
from remote_payload.checkpoint.errors import (
    MalformedCheckpointError,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
)
from remote_payload.checkpoint.inert import StorageRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.records import DataFile, RawCheckpoint, Record, integrity_problem
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.unpickle import Unpickled, unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
_FIRST_READ = 1 << 20
_SIZE = struct.Struct("<q")


class TorchLegacyReader:
    """Reads the pickles at the front and the size in front of each storage."""

    def recognises(self, head: bytes) -> bool:
        return head[:1] == b"\x80" and _MAGIC_BYTES in head[:16]

    def read(self, source: Source, limits: Limits) -> RawCheckpoint:
        pickles = _Pickles(source, limits)
        magic, version, system = pickles.next().value, pickles.next().value, pickles.next().value
        if magic != _MAGIC or version != 1001 or not isinstance(system, dict):
            raise MalformedCheckpointError(f"{source.path} begins like a legacy torch file of an unknown version")
        if system.get("little_endian") is not True:
            raise UnsupportedCheckpointError("a legacy torch file written on a big-endian machine")
        tree = pickles.next()
        keys = pickles.next().value
        if not isinstance(keys, list):
            raise MalformedCheckpointError("the list of storages is missing")
        raw = RawCheckpoint(
            format="torch_legacy",
            root=tree.value,
            files=(DataFile(source.path, source.size),),
            records=(),
            storages={},
            symbols=tree.symbols,
            storage_refs=tree.storage_refs,
            cost=tree.cost,
            format_version=str(version),
        )
        _place_storages(raw, source, keys, tree.storages, pickles.position)
        return raw


class _Pickles:
    """Pickles that follow each other; more of the file is read as they ask for it."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._data = source.read(0, min(source.size, _FIRST_READ))
        self.position = 0

    def next(self) -> Unpickled:
        while True:
            try:
                result = unpickle(self._data, self._limits, self.position)
            except TruncatedCheckpointError:
                wanted = min(self._source.size, 8 * len(self._data), self._limits.pickle_bytes)
                if wanted <= len(self._data):
                    raise
                self._data = self._source.read(0, wanted)
            else:
                self.position = result.end
                return result


def _place_storages(
    raw: RawCheckpoint, source: Source, keys: list[object], storages: dict[str, StorageRef], position: int
) -> None:
    records, missing = [], []
    needed = position
    for key in keys:
        storage = storages.get(key[:200]) if isinstance(key, str) else None
        width = item_bytes(storage.dtype) if storage else None
        if storage is None or width is None:
            raise MalformedCheckpointError("the list of storages names one that no tensor uses")
        start, length = needed + _SIZE.size, storage.numel * width
        needed = start + length
        if needed > source.size:
            missing.append(storage.key)
            continue
        stated = _SIZE.unpack(source.read(start - _SIZE.size, _SIZE.size))[0]
        if stated != storage.numel:
            raw.problems.append(
                integrity_problem(
                    "integrity.record_size",
                    f"Storage {storage.key} holds {stated} elements, its tensors expect {storage.numel}",
                    (storage.key,),
                    {"stated_elements": stated, "expected_elements": storage.numel},
                    "From here on nothing in the file is where it should be; no later tensor is read.",
                )
            )
            break
        record = Record(storage.key, 0, start, length)
        records.append(record)
        raw.storages[storage.key] = record
    raw.records = tuple(records)
    if missing:
        raw.problems.append(
            integrity_problem(
                "integrity.truncated",
                f"The file ends before {len(missing)} of {len(keys)} storages are complete",
                tuple(missing),
                {"file_bytes": source.size, "needed_bytes": needed, "missing_bytes": needed - source.size},
                "The sizes of the storages add up to more than the file holds.",
            )
        )
