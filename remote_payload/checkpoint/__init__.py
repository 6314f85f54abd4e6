"""Checkpoints read without executing them: header facts with the standard library alone, tensors by position."""

from __future__ import annotations

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.findings import header_findings
from remote_payload.checkpoint.header import CheckpointHeader, Role, Section, TensorEntry
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
    "header_findings",
    "read_header",
]
