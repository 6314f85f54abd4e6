"""What client and node say to each other: types, versions, names and the node's layout. Standard library only."""

from __future__ import annotations

PROTOCOL_VERSION = 1
"""Raised when a message changes meaning. Client and agent refuse each other unless it is equal."""
