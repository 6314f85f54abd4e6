"""What a command imports before it sends anything, and what it does at its end: neither longer than it must."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_stages_up_to_a_transfer_import_no_report_and_no_ssh() -> None:
    late = ("jinja2", "orchestrator.report", "orchestrator.history", "paramiko", "fabric", "asyncssh", "torch", "numpy")
    program = (
        "import sys, orchestrator.pipeline.resolve, orchestrator.pipeline.run, orchestrator.pipeline.world\n"
        f"print([name for name in {late!r} if name in sys.modules])"
    )
    assert run(program) == "[]"


def test_at_its_end_the_command_looks_for_no_cycles() -> None:
    program = (
        "import atexit, gc, sys; sys.argv = ['remote-eval', '--version']\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from orchestrator.cli import main; main()"
    )
    assert run(program).splitlines()[-1] == "True"
