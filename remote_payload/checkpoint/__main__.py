"""`python -m remote_payload.checkpoint PATH [--json]`: header facts of a checkpoint, nothing executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.findings import header_findings
from remote_payload.checkpoint.pickle_globals import allowed_globals
from remote_payload.checkpoint.reader import read_header
from remote_payload.checkpoint.render import render_header
from remote_payload.wire.codec import to_json
from remote_payload.wire.names import printable
from remote_payload.wire.results import Finding, Severity

_USAGE = "usage: checkpoint PATH [--json] | checkpoint --allow-list"


def main(arguments: list[str]) -> int:
    """Print the header of one checkpoint. Returns 0; 1 if a finding is an error; 2 if it cannot be read or for usage.

    With `--json` one document on standard output: `header` (null if unreadable), `findings`, `reads` ([offset, length]
    of what of the file that took), `error` (null, or `kind`, `message` and `action`). `--allow-list` alone prints the
    globals that a pickle may name without a finding.
    """
    if arguments == ["--allow-list"]:
        _write("".join(f"{name}\n" for name in allowed_globals()))
        return 0
    paths = [a for a in arguments if a != "--json"]
    if len(paths) == 2 and paths[0] == "--":
        paths = paths[1:]
    if len(paths) != 1 or not paths[0]:
        print(_USAGE, file=sys.stderr)
        return 2
    as_json = "--json" in arguments
    reads: list[tuple[int, int]] = []
    try:
        header = read_header(paths[0], on_read=lambda offset, length: reads.append((offset, length)))
    except CheckpointError as error:
        _report_error(error, as_json)
        return 2
    findings = header_findings(header)
    if as_json:
        _print_json(header.to_json(), findings, None, reads)
    else:
        _write(render_header(header, findings))
    return 1 if any(f.severity is Severity.ERROR for f in findings) else 0


def _report_error(error: CheckpointError, as_json: bool) -> None:
    if as_json:
        _print_json(None, list(error.findings), {"kind": error.kind, "message": str(error), "action": error.action})
        return
    lines = [str(error), *(f"{f.severity.value}: {f.id}: {f.title}" for f in error.findings), error.action]
    for line in lines:
        print(printable(line).replace("\n", "\\n"), file=sys.stderr)


def _print_json(header: Any, findings: list[Finding], error: Any, reads: Sequence[tuple[int, int]] = ()) -> None:
    document = {"header": header, "findings": to_json(findings), "reads": to_json(reads), "error": error}
    _write(json.dumps(document, allow_nan=False) + "\n")


def _write(text: str) -> None:
    # The terminal's encoding may lack characters that a checkpoint's names have.
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
