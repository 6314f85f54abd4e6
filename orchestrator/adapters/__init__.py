"""The user's adapter as source: a first one to begin with, and what can be told of one without running it."""

from orchestrator.adapters.scaffold import KINDS, scaffold
from orchestrator.adapters.source import AdapterSource, check_source, find_source

__all__ = ["KINDS", "AdapterSource", "check_source", "find_source", "scaffold"]
