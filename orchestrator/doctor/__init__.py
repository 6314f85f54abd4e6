"""Small checks of this machine and a cluster; each says what it saw and what to mend."""

from orchestrator.doctor.checks import Check, CheckState, check_node, check_this_machine

__all__ = ["Check", "CheckState", "check_node", "check_this_machine"]
