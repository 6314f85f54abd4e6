"""`python -m benchmarks`: run every measurement and print it as Markdown."""

from __future__ import annotations

import platform
import sys

from benchmarks import client

HEADER = "| what | ours, s | theirs, s | theirs / ours | our MB | their MB |\n| --- | --- | --- | --- | --- | --- |"


def main() -> int:
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}\n\n{HEADER}")
    for line in client.rows():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
