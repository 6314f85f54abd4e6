"""A pickle that torch did not write: looked at for what it would run, and for the plain values in it."""

from __future__ import annotations

from remote_payload.checkpoint.errors import MalformedCheckpointError, NotACheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.records import DataFile, RawCheckpoint
from remote_payload.checkpoint.source import Source
from remote_payload.checkpoint.unpickle import unpickle
from remote_payload.wire.results import Severity

_PROTOCOL_0_STARTS = b"(cidlIFLSVNg]})tp\x80"


class PlainPickleReader:
    """Tried last: protocols 0 and 1 have no signature, so only a stream that runs to its end counts as one."""

    def recognises(self, head: bytes) -> bool:
        return bool(head) and head[0] in _PROTOCOL_0_STARTS

    def read(self, source: Source, limits: Limits) -> RawCheckpoint:
        data = source.read(0, min(source.size, limits.pickle_bytes))
        has_signature = data[:1] == b"\x80" and len(data) > 1 and data[1] <= 5
        try:
            unpickled = unpickle(data, limits)
        except (MalformedCheckpointError, TruncatedCheckpointError) as error:
            # A broken pickle still runs everything in front of the break.
            if has_signature or any(f.severity is Severity.ERROR for f in error.findings):
                raise
            raise NotACheckpointError(f"{source.path} is neither a torch file, safetensors nor a pickle") from None
        raw = RawCheckpoint(
            format="pickle",
            root=unpickled.value,
            files=(DataFile(source.path, source.size),),
            records=(),
            storages={},
            symbols=unpickled.symbols,
            cost=unpickled.cost,
        )
        raw.notes.append("A plain pickle that torch.save did not write; it holds no torch tensors.")
        if unpickled.end < source.size:
            raw.notes.append(f"{source.size - unpickled.end} bytes follow the pickle; nothing of them is read.")
        return raw
