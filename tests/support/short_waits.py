"""Run the command line with agents that soon give up waiting for their client, which therefore often says that it is
there.

    python -m tests.support.short_waits AGENT_IDLE_S ALIVE_INTERVAL_S -- ARGUMENTS
"""

from __future__ import annotations

import sys

from orchestrator import standby
from orchestrator.cli import main as command_line


def main() -> None:
    agent_idle_s, alive_interval_s, separator, *arguments = sys.argv[1:]
    if separator != "--":
        sys.exit(__doc__)
    standby.AGENT_IDLE_S, standby.ALIVE_INTERVAL_S = float(agent_idle_s), float(alive_interval_s)
    sys.argv = ["remote-eval", *arguments]
    command_line()


if __name__ == "__main__":
    main()
