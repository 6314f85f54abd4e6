"""Handing `nightly tick` to the machine's scheduler: planned and shown first, then applied."""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from orchestrator.errors import NodeUnfitError, UsageError
from orchestrator.fsutil import write_atomically
from orchestrator.layout import LocalLayout
from orchestrator.nightly import render
from orchestrator.nightly.render import Command, DailyTime
from remote_payload.wire.names import printable

SchedulerName = Literal["systemd", "launchd", "cron"]
COMMAND_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What of this machine starts things at night. `crontab` is its present content, None for the others."""

    name: SchedulerName
    home: Path
    units: Path
    crontab: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One command. `optional`: its failure changes nothing (there was nothing to stop)."""

    argv: tuple[str, ...]
    stdin: bytes | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class InstallPlan:
    """Everything that will happen, in this order: `before`, `remove`, `files`, `commands`. `text` shows all of it.

    `log` is where the scheduler will append; its folder is made beforehand.
    """

    scheduler: SchedulerName
    files: tuple[tuple[Path, bytes], ...]
    commands: tuple[Step, ...]
    text: str
    before: tuple[Step, ...] = ()
    remove: tuple[Path, ...] = ()
    log: Path | None = None


def find_scheduler() -> Scheduler:
    """systemd where a user manager answers, launchd on macOS, else cron. Raises `UsageError` where there is none."""
    home = Path.home()
    if sys.platform == "darwin":
        return Scheduler("launchd", home, home / "Library" / "LaunchAgents")
    units = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "systemd" / "user"
    if shutil.which("systemctl") and _run(("systemctl", "--user", "show", "--property=Version")).returncode == 0:
        return Scheduler("systemd", home, units)
    if shutil.which("crontab"):
        return Scheduler("cron", home, units, _read_crontab())
    raise UsageError(
        "this machine has neither a systemd user manager nor cron",
        action="Call `remote-eval nightly tick` from whatever starts things at night here.",
    )


def nightly_command(layout: LocalLayout, file: Path | None = None) -> Command:
    """The tick as a scheduler must call it: by this interpreter's absolute path, whatever PATH is there."""
    argv = [sys.executable, "-m", "orchestrator.cli", "nightly", "tick"]
    if file is not None:
        argv += ["--file", str(file.absolute())]
    home = os.environ.get("REMOTE_EVAL_HOME")
    environment = {"REMOTE_EVAL_HOME": str(Path(home).expanduser().absolute())} if home else {}
    return Command(tuple(argv), environment, Path.home(), layout.nightly_log)


def plan_install(scheduler: Scheduler, command: Command, at: str = "02:30") -> InstallPlan:
    """What installing would do. Pure. Raises `UsageError` for no time of day, `ConfigurationError` for odd paths."""
    time = DailyTime.parse(at)
    files: tuple[tuple[Path, bytes], ...]
    commands: tuple[Step, ...]
    if scheduler.name == "systemd":
        files = (
            (scheduler.units / f"{render.UNIT}.service", render.systemd_service(command).encode()),
            (scheduler.units / f"{render.UNIT}.timer", render.systemd_timer(time).encode()),
        )
        commands = (
            Step(("systemctl", "--user", "daemon-reload")),
            Step(("systemctl", "--user", "enable", "--now", f"{render.UNIT}.timer")),
        )
        note = (
            "The timer runs while you have a session here. `loginctl enable-linger` lets it run without one.\n"
            f"What it did: journalctl --user -u {render.UNIT}\n"
        )
        return _plan("systemd", files, commands, note)
    if scheduler.name == "launchd":
        path = _plist(scheduler)
        files = ((path, render.launchd_plist(command, time.spread(_seed()))),)
        commands = (Step(("launchctl", "bootstrap", _domain(), str(path))),)
        before = (Step(("launchctl", "bootout", f"{_domain()}/{render.LABEL}"), optional=True),)
        return _plan("launchd", files, commands, f"What it did: {command.log}\n", before=before, log=command.log)
    block = render.crontab_block(command, time.spread(_seed()))
    step = Step(("crontab", "-"), stdin=render.with_block(scheduler.crontab or b"", block))
    note = f"cron does not make up for nights when the machine was off. What it did: {command.log}\n"
    return _plan(
        "cron", (), (step,), f"In the crontab, all other lines untouched:\n\n{_shown(block)}\n{note}", log=command.log
    )


def plan_uninstall(scheduler: Scheduler) -> InstallPlan | None:
    """What taking it away would do; None where nothing of ours is there. Reads which files exist."""
    if scheduler.name == "cron":
        present = scheduler.crontab or b""
        rest = render.without_block(present)
        if rest == present:
            return None
        return _plan("cron", (), (Step(("crontab", "-"), stdin=rest),), "Our lines leave the crontab.\n")
    files: tuple[Path, ...]
    commands: tuple[Step, ...] = ()
    if scheduler.name == "launchd":
        files = (_plist(scheduler),)
        before = (Step(("launchctl", "bootout", f"{_domain()}/{render.LABEL}"), optional=True),)
    else:
        files = tuple(scheduler.units / f"{render.UNIT}.{kind}" for kind in ("timer", "service"))
        before = (Step(("systemctl", "--user", "disable", "--now", f"{render.UNIT}.timer"), optional=True),)
        commands = (Step(("systemctl", "--user", "daemon-reload")),)
    existing = tuple(path for path in files if path.exists())
    if not existing:
        return None
    return _plan(scheduler.name, (), commands, "", before=before, remove=existing)


def apply_plan(plan: InstallPlan) -> None:
    """Do it. Raises `NodeUnfitError` with the scheduler's own words where a command fails."""
    for step in plan.before:
        _apply(step)
    for path in plan.remove:
        path.unlink(missing_ok=True)
    if plan.log is not None:
        plan.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path, content in plan.files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, mode=0o644)
    for step in plan.commands:
        _apply(step)


def _plan(
    scheduler: SchedulerName,
    files: tuple[tuple[Path, bytes], ...],
    commands: tuple[Step, ...],
    note: str,
    before: tuple[Step, ...] = (),
    remove: tuple[Path, ...] = (),
    log: Path | None = None,
) -> InstallPlan:
    parts = [f"remove {path}\n" for path in remove]
    parts += [f"write {path}:\n\n{_shown(content)}\n" for path, content in files]
    parts += [f"run {render.shell_text(step.argv)}\n" for step in (*before, *commands)]
    text = printable("".join([*parts, note]))
    return InstallPlan(scheduler, files, commands, text, before, remove, log)


def _apply(step: Step) -> None:
    done = _run(step.argv, step.stdin)
    if done.returncode != 0 and not step.optional:
        raise NodeUnfitError(
            f"`{render.shell_text(step.argv)}` ended with exit status {done.returncode}",
            action="Mend what it says, then repeat; nothing else was changed by it.",
            details=(done.stderr or done.stdout).decode("utf-8", "replace"),
        )


def _run(argv: tuple[str, ...], stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            argv,
            input=stdin or b"",
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(argv, 127, b"", f"{argv[0]}: not found".encode())
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, b"", f"no answer within {COMMAND_TIMEOUT_S:.0f} s".encode())


def _read_crontab() -> bytes:
    """The present crontab. Raises `NodeUnfitError` unless cron says that there is none: writing would destroy it."""
    done = _run(("crontab", "-l"))
    if done.returncode == 0:
        return done.stdout
    # crontab has one exit status for every trouble; its fixed words alone tell an empty crontab from an unreadable one.
    says_none = any(words in done.stderr.lower() for words in (b"no crontab for", b"can't open"))
    if done.stdout or not says_none:
        raise NodeUnfitError(
            "the present crontab cannot be read, so it is left alone",
            action="See whether `crontab -l` works for you.",
            details=done.stderr.decode("utf-8", "replace"),
        )
    return b""


def _shown(content: bytes) -> str:
    return "".join(f"    {line}\n" for line in content.decode("utf-8", "replace").splitlines())


def _plist(scheduler: Scheduler) -> Path:
    return scheduler.units / f"{render.LABEL}.plist"


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _seed() -> str:
    return f"{getpass.getuser()}@{platform.node()}"
