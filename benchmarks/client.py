"""The client's own speed: how fast `--help` answers, and header facts of a 21 GB checkpoint.

Against what a user would do instead: a bare Typer application's `--help`; and `torch.load` of the same file with
`mmap=True` under `weights_only`, which reads no tensor either.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import pair, row

_BARE_TYPER = (
    "import typer\n"
    "app = typer.Typer(rich_markup_mode=None)\n"
    "@app.command()\n"
    "def a(): ...\n"
    "@app.command()\n"
    "def b(): ...\n"
    "app(['--help'])\n"
)
_WRITE = (
    "import sys, pathlib; from tests.support.checkpoints import write_sparse_reference\n"
    "write_sparse_reference(pathlib.Path(sys.argv[1]))"
)
_TORCH = (
    "import sys, torch\n"
    "loaded = torch.load(sys.argv[1], map_location='cpu', mmap=True, weights_only=True)\n"
    "print(len(loaded['model_state_dict']), sum(t.numel() for t in loaded['model_state_dict'].values()))\n"
)


def rows() -> list[str]:
    """Two rows of the table."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "sparse.pt"
        # In a process of its own: a child's peak memory counts what its parent held when it was forked.
        subprocess.run([python, "-c", _WRITE, str(checkpoint)], check=True, timeout=300)
        return [
            row(
                "`--help` against a bare Typer app",
                pair([python, "-m", "orchestrator.cli", "--help"], [python, "-c", _BARE_TYPER]),
            ),
            row(
                "header facts of 21 GB against `torch.load(mmap=True)`",
                pair(
                    [python, "-m", "remote_payload.checkpoint", str(checkpoint)],
                    [python, "-c", _TORCH, str(checkpoint)],
                ),
            ),
        ]
