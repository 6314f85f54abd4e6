"""The texts of a systemd timer and service, a launchd plist and a crontab line. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import plistlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import ConfigurationError, UsageError

UNIT = "remote-eval-nightly"
LABEL = "org.remote-eval.nightly"
CRON_BEGIN = b"# remote-eval nightly: begin (written by `remote-eval nightly install`)"
CRON_END = b"# remote-eval nightly: end"
SPREAD_MINUTES = 20
TICK_LIMIT = "20h"
_TIME = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])\Z")
_NOT_IN_EXECUTABLES = frozenset("\"'\\$")
_SYSTEMD_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclasses.dataclass(frozen=True)
class Command:
    """What is to run nightly: absolute argv, the environment that it needs, where it runs and writes."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log: Path


@dataclasses.dataclass(frozen=True)
class DailyTime:
    """Local time of day."""

    hour: int
    minute: int

    @classmethod
    def parse(cls, text: str) -> DailyTime:
        """Read `HH:MM`. Raises `UsageError`."""
        match = _TIME.match(text)
        if match is None:
            raise UsageError(f"{text!r} is no time of day", action="Write HH:MM, such as 02:30.")
        return cls(int(match.group(1)), int(match.group(2)))

    def spread(self, seed: str) -> DailyTime:
        """A time up to `SPREAD_MINUTES` later, always the same for one `seed`: for want of a random delay."""
        offset = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") % SPREAD_MINUTES
        total = (self.hour * 60 + self.minute + offset) % (24 * 60)
        return DailyTime(*divmod(total, 60))


def systemd_service(command: Command) -> str:
    """The unit that runs one tick. A tick that found another one at work (exit 75) has not failed."""
    argv = command.argv
    if set(argv[0]) & _NOT_IN_EXECUTABLES:
        # systemd refuses quotes there, and hands on an argv[0] in which it has expanded `$`.
        argv = ("/bin/sh", "-c", 'exec "$0" "$@"', *argv)
    environment = "".join(f"Environment={_systemd_word(f'{k}={v}')}\n" for k, v in sorted(command.environment.items()))
    start = " ".join([_systemd_word(argv[0]), *(_systemd_word(a).replace("$", "$$") for a in argv[1:])])
    return (
        "[Unit]\n"
        "Description=Evaluate checkpoints that are new (remote-eval nightly tick)\n"
        "\n"
        "[Service]\n"
        "Type=oneshot\n"
        f"WorkingDirectory={_systemd_path(str(command.folder))}\n"
        f"{environment}"
        f"ExecStart={start}\n"
        "SuccessExitStatus=75\n"
        f"TimeoutStartSec={TICK_LIMIT}\n"
    )


def systemd_timer(at: DailyTime) -> str:
    """The unit that starts it daily, after a random delay, and once after boot for a night that was missed."""
    return (
        "[Unit]\n"
        "Description=Every night: remote-eval nightly tick\n"
        "\n"
        "[Timer]\n"
        f"OnCalendar=*-*-* {at.hour:02}:{at.minute:02}:00\n"
        f"RandomizedDelaySec={SPREAD_MINUTES}min\n"
        "Persistent=true\n"
        "\n"
        "[Install]\n"
        "WantedBy=timers.target\n"
    )


def launchd_plist(command: Command, at: DailyTime) -> bytes:
    """The agent's property list. launchd itself makes up for a night that the machine slept through."""
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": list(command.argv),
            "EnvironmentVariables": dict(command.environment),
            "WorkingDirectory": str(command.folder),
            "StartCalendarInterval": {"Hour": at.hour, "Minute": at.minute},
            "StandardOutPath": str(command.log),
            "StandardErrorPath": str(command.log),
            "ProcessType": "Background",
        }
    )


def crontab_block(command: Command, at: DailyTime) -> bytes:
    """Our lines of a crontab. Raises `ConfigurationError` for backslashes and control characters: cron garbles them."""
    words = [f"{k}={v}" for k, v in sorted(command.environment.items())]
    if words:
        words.insert(0, "/usr/bin/env")
    shell = f"{shlex.join([*words, *command.argv])} >> {shlex.quote(str(command.log))} 2>&1"
    if "\\" in shell or any(ord(c) < 32 or ord(c) == 127 for c in shell):
        raise ConfigurationError(
            "a path of this installation holds a backslash or a control character, which a crontab cannot carry",
            action="Install remote-eval under another path, or call `remote-eval nightly tick` from a script of yours.",
        )
    line = f"{at.minute} {at.hour} * * * {shell.replace('%', chr(92) + '%')}"
    return b"\n".join([CRON_BEGIN, line.encode("utf-8", "surrogateescape"), CRON_END, b""])


def with_block(crontab: bytes, block: bytes) -> bytes:
    """`crontab` with our lines replaced, or appended; every other line stays byte for byte."""
    rest = without_block(crontab)
    if rest and not rest.endswith(b"\n"):
        rest += b"\n"
    return rest + block


def without_block(crontab: bytes) -> bytes:
    """`crontab` without our lines. Raises `ConfigurationError` where the marks do not pair up."""
    lines = crontab.splitlines(keepends=True)
    bare = [line.rstrip(b"\r\n") for line in lines]
    begins = [i for i, line in enumerate(bare) if line == CRON_BEGIN]
    ends = [i for i, line in enumerate(bare) if line == CRON_END]
    if not begins and not ends:
        return crontab
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise ConfigurationError(
            "the crontab's remote-eval marks do not pair up", action="Mend them by hand with `crontab -e`, then repeat."
        )
    return b"".join([*lines[: begins[0]], *lines[ends[0] + 1 :]])


def _systemd_word(text: str) -> str:
    """One quoted word of a unit file: C-style escapes, and `%` doubled since it introduces specifiers."""
    escaped = "".join(_SYSTEMD_ESCAPES.get(c, c) for c in text).replace("%", "%%")
    _refuse_control(escaped)
    return f'"{escaped}"'


def _systemd_path(text: str) -> str:
    """A path where systemd takes the rest of the line as it is, but for specifiers."""
    _refuse_control(text)
    return text.replace("%", "%%")


def _refuse_control(text: str) -> None:
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigurationError(
            "a path of this installation holds a control character, which a unit file cannot carry",
            action="Install remote-eval under another path.",
        )


def shell_text(argv: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(argv)
