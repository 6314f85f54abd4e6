"""The node on loopback: a small SSH server of our own, so that the whole job runs without any cluster."""

from __future__ import annotations

from orchestrator.embedded.node import ensure_embedded_node, stop_embedded_node

__all__ = ["ensure_embedded_node", "stop_embedded_node"]
