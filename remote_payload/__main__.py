"""The payload's command line: `python payload.pyz agent|job|health|reconstruct|checkpoint|reference …`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "agent": "remote_payload.agent.__main__",
    "job": "remote_payload.jobs.__main__",
    "probe": "remote_payload.probe",
    "health": "remote_payload.health.__main__",
    "reconstruct": "remote_payload.reconstruct.__main__",
    "checkpoint": "remote_payload.checkpoint.__main__",
    "reference": "remote_payload.reference.__main__",
}


def main() -> int:
    """Hand the rest of the command line to the named module's `main(arguments) -> int`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(f"usage: payload {'|'.join(COMMANDS)} …", file=sys.stderr)
        return 2
    main_function = importlib.import_module(COMMANDS[name]).main
    return int(main_function(sys.argv[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
