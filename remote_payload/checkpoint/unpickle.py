"""One call from a pickle's bytes to its tree, with hostile streams turned into `CheckpointError`."""

from __future__ import annotations

import dataclasses

from remote_payload.checkpoint.errors import MalformedCheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.inert import StorageRef, Symbol
from remote_payload.checkpoint.limits import Cost, Limits
from remote_payload.checkpoint.pickle_globals import SymbolTable, call_known, load_storage
from remote_payload.checkpoint.pickle_machine import PickleMachine
from remote_payload.checkpoint.pickle_values import MalformedPickleError, PickleEndsError
from remote_payload.checkpoint.security import unsafe_global_findings


@dataclasses.dataclass(frozen=True)
class Unpickled:
    """A pickle's value, the globals and storages that it names, and the position behind its STOP.

    `storages` has the first storage of each key; `storage_refs` all, where a key is used with different claims.
    """

    value: object
    symbols: tuple[Symbol, ...]
    storages: dict[str, StorageRef]
    storage_refs: tuple[StorageRef, ...]
    end: int
    cost: Cost


def unpickle(data: bytes, limits: Limits, position: int = 0) -> Unpickled:
    """Interpret one pickle. Raises `CheckpointError`: truncated or malformed, with what the pickle tried to run."""
    table = SymbolTable()
    storages: dict[str, StorageRef] = {}
    storage_refs: list[StorageRef] = []

    def load(identifier: object) -> StorageRef:
        storage = load_storage(identifier)
        known = storages.get(storage.key)
        if known is not None and (known.dtype, known.numel) == (storage.dtype, storage.numel):
            return known
        machine.charge(100)
        storages.setdefault(storage.key, storage)
        storage_refs.append(storage)
        return storage

    machine = PickleMachine(data, table.find, call_known, load, limits, position)
    try:
        value = machine.run()
    except MalformedPickleError as error:
        kind = TruncatedCheckpointError if isinstance(error, PickleEndsError) else MalformedCheckpointError
        unreadable = kind(str(error), unsafe_global_findings(table.all()))
        # Every opcode is a byte at least.
        unreadable.cost = Cost(len(data), machine.position - position, machine.memory_used)
        raise unreadable from None
    # An inflated pickle costs its whole length, however soon it stops.
    cost = Cost(len(data), machine.opcodes, machine.memory_used)
    return Unpickled(value, table.all(), storages, tuple(storage_refs), machine.position, cost)
