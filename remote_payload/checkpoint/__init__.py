"""Checkpoints read without executing them: header facts with the standard library alone, tensors by position.

Files: torch's zip and legacy formats, safetensors, plain pickles. Folders: shards of either with an index,
torch.distributed.checkpoint (FSDP2, Lightning's sharded strategy), DeepSpeed ZeRO. Whatever the layout, one budget
bounds what reading may cost, and names that a checkpoint gives are taken only inside its own folder.
"""

from __future__ import annotations

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.findings import header_findings
from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry, TensorPiece
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Limits
from remote_payload.checkpoint.reader import read_header

__all__ = [
    "DEFAULT_LIMITS",
    "CheckpointError",
    "CheckpointHeader",
    "Limits",
    "Role",
    "Section",
    "TensorEntry",
    "TensorPiece",
    "header_findings",
    "read_header",
]
