"""The header's findings: what its own text and sizes give away."""

from __future__ import annotations

from remote_payload.checkpoint.header import CheckpointHeader
from remote_payload.wire.results import Finding


def header_findings(header: CheckpointHeader) -> list[Finding]:
    """Integrity and security findings, known without reading a tensor."""
    return list(header.problems)
