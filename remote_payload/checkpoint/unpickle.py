"""One call from a pickle's bytes to its tree, with hostile streams turned into `CheckpointError`."""

from __future__ import annotations

import dataclasses
from typing import Optional

from remote_payload.checkpoint.errors import MalformedCheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.inert import StorageRef, Symbol
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.pickle_globals import SymbolTable, call_known, load_storage
from remote_payload.checkpoint.pickle_machine import PickleMachine
from remote_payload.checkpoint.pickle_values import MalformedPickleError, PickleEndsError
from remote_payload.checkpoint.security import unsafe_global_findings


@dataclasses.dataclass(frozen=True)
class Unpickled:
    """A pickle's value, the globals and storages that it names, and the position behind its STOP."""

    value: object
    symbols: tuple[Symbol, ...]
    storages: dict[str, StorageRef]
    end: int


def unpickle(data: bytes, limits: Limits, position: int = 0) -> Unpickled:
    """Interpret one pickle. Raises `CheckpointError`: truncated or malformed, with what the pickle tried to run."""
    table = SymbolTable()
    storages: dict[str, StorageRef] = {}

    def load(identifier: object) -> StorageRef:
        storage = load_storage(identifier)
        return storages.setdefault(storage.key, storage) if _same(storages.get(storage.key), storage) else storage

    machine = PickleMachine(data, table.find, call_known, load, limits, position)
    try:
        value = machine.run()
    except PickleEndsError as error:
        raise TruncatedCheckpointError(str(error), unsafe_global_findings(table.all())) from None
    except MalformedPickleError as error:
        raise MalformedCheckpointError(str(error), unsafe_global_findings(table.all())) from None
    return Unpickled(value, table.all(), storages, machine.position)


def _same(known: Optional[StorageRef], storage: StorageRef) -> bool:
    return known is None or (known.dtype, known.numel) == (storage.dtype, storage.numel)
