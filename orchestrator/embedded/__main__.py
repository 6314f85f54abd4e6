"""`python -m orchestrator.embedded FOLDER IDLE_LIMIT_S`: the server, in the foreground."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    from orchestrator.embedded.server import serve

    folder, idle_limit_s = sys.argv[1:]
    return serve(Path(folder), float(idle_limit_s))


if __name__ == "__main__":
    sys.exit(main())
