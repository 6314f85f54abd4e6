"""Texts for systemd, launchd and cron, read back by the tools that will read them."""

from __future__ import annotations

import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigurationError, NodeUnfitError, UsageError
from orchestrator.layout import LocalLayout
from orchestrator.nightly.install import (
    InstallPlan,
    Scheduler,
    Step,
    apply_plan,
    nightly_command,
    plan_install,
    plan_uninstall,
)
from orchestrator.nightly.render import (
    CRON_BEGIN,
    CRON_END,
    Command,
    DailyTime,
    crontab_block,
    systemd_service,
    systemd_timer,
    with_block,
    without_block,
)

ODD = "/opt/a b%h$HOME\"'x/bin/python"
ODD_COMMAND = Command(
    (ODD, "-m", "orchestrator.cli", "nightly", "tick"),
    {"REMOTE_EVAL_HOME": "/d %i$x"},
    Path("/h %n"),
    Path("/l %g/n.log"),
)


def plain(layout: LocalLayout | None = None) -> Command:
    folders = layout or LocalLayout(Path("/d"), Path("/c"), Path("/k"))
    return nightly_command(folders)


def test_the_command_depends_on_no_path_variable() -> None:
    command = plain()
    assert command.argv == (sys.executable, "-m", "orchestrator.cli", "nightly", "tick")
    assert Path(command.argv[0]).is_absolute()


def test_the_home_that_was_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_EVAL_HOME", "/somewhere else")
    assert plain().environment == {"REMOTE_EVAL_HOME": "/somewhere else"}


@pytest.mark.parametrize("text", ["24:00", "2", "02:60", "2:3", "", "02:30:00", "aa:bb", "-1:00"])
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        DailyTime.parse(text)


def test_the_spread_is_the_same_for_one_user_and_wraps_at_midnight() -> None:
    late = DailyTime.parse("23:55")
    times = {late.spread(f"user{i}@host") for i in range(200)}
    assert len(times) > 10
    assert all(0 <= t.hour <= 23 and 0 <= t.minute <= 59 for t in times)
    assert late.spread("a") == late.spread("a")


def systemd_analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.fail("systemd-analyze reads the unit files here: apt-get install systemd")
    return found


def verify_units(folder: Path) -> list[str]:
    """systemd's own complaints about our units."""
    done = subprocess.run(
        [systemd_analyze(), "verify", "--man=no", *(str(p) for p in sorted(folder.glob("remote-eval-nightly.*")))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [line for line in done.stderr.splitlines() if "remote-eval" in line]


if sys.platform.startswith("linux"):

    @pytest.mark.parametrize("name", ["plain", "a b%h", "a b%h$HOME\"'x"])
    def test_systemd_reads_the_units_as_meant_even_with_odd_paths(tmp_path: Path, name: str) -> None:
        interpreter = tmp_path / name / "python"
        interpreter.parent.mkdir()
        interpreter.symlink_to(sys.executable)
        command = Command(
            (str(interpreter), "-c", "pass"), {"REMOTE_EVAL_HOME": "/d %i$x\\"}, tmp_path, tmp_path / "log"
        )
        (tmp_path / "remote-eval-nightly.service").write_text(systemd_service(command))
        (tmp_path / "remote-eval-nightly.timer").write_text(systemd_timer(DailyTime(2, 5)))
        assert verify_units(tmp_path) == []
        if "$" not in name:
            interpreter.unlink()
            assert any("python" in line for line in verify_units(tmp_path)), "systemd looked at another path"


def unquote_systemd(line: str) -> list[str]:
    """A reading of ExecStart by systemd.service(5): quotes, C escapes, specifiers, then variables."""
    words = [w.encode().decode("unicode_escape") for w in _quoted(line)]
    assert all(w.count("%") == 2 * w.count("%%") for w in words)
    return [w.replace("%%", "%") for w in words]


def _quoted(line: str) -> list[str]:
    words, at = [], 0
    while at < len(line):
        assert line[at] == '"'
        end = at + 1
        while line[end] != '"':
            end += 2 if line[end] == "\\" else 1
        words.append(line[at + 1 : end])
        at = end + 2
    return words


def test_an_interpreter_with_a_dollar_reaches_python_unexpanded() -> None:
    start = next(x for x in systemd_service(ODD_COMMAND).splitlines() if x.startswith("ExecStart="))
    words = unquote_systemd(start.removeprefix("ExecStart="))
    assert words[0] == "/bin/sh"
    assert all("$" not in w.replace("$$", "") for w in words[1:])
    argv = [w.replace("$$", "$") for w in words]
    done = subprocess.run([*argv[:3], "/bin/echo", *argv[3:]], capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout == f"{ODD} -m orchestrator.cli nightly tick\n"


def test_the_timer_makes_up_for_missed_nights_and_spreads_the_load() -> None:
    text = systemd_timer(DailyTime(2, 5))
    assert "OnCalendar=*-*-* 02:05:00\n" in text
    assert "Persistent=true\n" in text
    assert "RandomizedDelaySec=20min\n" in text


def test_launchd_reads_back_the_very_words(tmp_path: Path) -> None:
    scheduler = Scheduler("launchd", tmp_path, tmp_path / "LaunchAgents")
    plan = plan_install(scheduler, ODD_COMMAND, "02:05")
    ((path, content),) = plan.files
    document = plistlib.loads(content)
    assert document["ProgramArguments"] == list(ODD_COMMAND.argv)
    assert document["EnvironmentVariables"] == ODD_COMMAND.environment
    assert path.suffix == ".plist"
    assert plan.before[0].optional


def as_cron_runs_it(block: bytes) -> str:
    """What cron hands to /bin/sh: the sixth field on, `\\%` being a percent sign."""
    line = block.splitlines()[1].decode()
    command = line.split(None, 5)[5]
    assert command.count("%") == command.count("\\%")
    return command.replace("\\%", "%")


def test_a_shell_reads_the_crontab_line_as_meant(tmp_path: Path) -> None:
    log = tmp_path / "odd %g$x'\" name" / "n.log"
    log.parent.mkdir()
    command = Command(("/bin/echo", ODD, "*", "~"), {"REMOTE_EVAL_HOME": "/d %i$x"}, tmp_path, log)
    line = as_cron_runs_it(crontab_block(command, DailyTime(2, 5)))
    subprocess.run(["/bin/sh", "-c", line], timeout=10, check=True, env={})
    assert log.read_text() == f"{ODD} * ~\n"


@pytest.mark.parametrize("odd", ["/a\\b/python", "/a\nb/python", "/a\x1bb/python"])
def test_a_path_that_cron_would_garble_is_refused(odd: str) -> None:
    with pytest.raises(ConfigurationError):
        crontab_block(Command((odd,), {}, Path("/"), Path("/l")), DailyTime(1, 1))


@pytest.mark.parametrize("odd", ["/a\x1bb/python"])
def test_a_path_that_a_unit_file_cannot_carry_is_refused(odd: str) -> None:
    with pytest.raises(ConfigurationError):
        systemd_service(Command((odd,), {}, Path("/"), Path("/l")))


BLOCK = crontab_block(Command(("/p",), {}, Path("/"), Path("/l")), DailyTime(1, 1))
LINES = st.lists(
    st.binary(max_size=30).filter(lambda b: not {b"\n"[0], b"\r"[0]} & set(b) and b not in (CRON_BEGIN, CRON_END)),
    max_size=8,
)


@given(before=LINES, after=LINES, ending=st.sampled_from([b"\n", b""]))
def test_other_lines_of_a_crontab_stay_byte_for_byte(before: list[bytes], after: list[bytes], ending: bytes) -> None:
    mine = b"".join(x + b"\n" for x in before) + (b"\n".join(after) + ending if after else b"")
    installed = with_block(mine, BLOCK)
    assert without_block(installed) in (mine, mine + b"\n")
    assert with_block(installed, BLOCK) == installed
    moved = BLOCK + mine
    assert without_block(moved) == mine


@pytest.mark.parametrize(
    "broken", [CRON_BEGIN + b"\nx\n", b"x\n" + CRON_END + b"\n", CRON_END + b"\n" + CRON_BEGIN + b"\n", BLOCK + BLOCK]
)
def test_a_crontab_with_unpaired_marks_is_left_alone(broken: bytes) -> None:
    with pytest.raises(ConfigurationError):
        without_block(broken)


def test_a_cron_plan_shows_our_lines_and_keeps_the_others(tmp_path: Path) -> None:
    present = b"MAILTO=me\n* * * * * unrelated\n"
    plan = plan_install(Scheduler("cron", tmp_path, tmp_path, present), plain(), "02:05")
    (step,) = plan.commands
    assert step.argv == ("crontab", "-")
    assert step.stdin is not None
    assert step.stdin.startswith(present)
    assert "orchestrator.cli nightly tick" in plan.text
    assert "unrelated" not in plan.text
    taken = plan_uninstall(Scheduler("cron", tmp_path, tmp_path, step.stdin))
    assert taken is not None
    assert taken.commands[0].stdin == present
    assert plan_uninstall(Scheduler("cron", tmp_path, tmp_path, present)) is None


def test_the_plan_shows_every_file_and_command_before_anything_is_written(tmp_path: Path) -> None:
    scheduler = Scheduler("systemd", tmp_path, tmp_path / "units")
    plan = plan_install(scheduler, plain(), "02:05")
    for path, content in plan.files:
        assert str(path) in plan.text
        assert all(line.strip() in plan.text for line in content.decode().splitlines())
    for step in plan.commands:
        assert shlex.join(step.argv) in plan.text
    assert not (tmp_path / "units").exists()
    assert plan_uninstall(scheduler) is None


def test_applying_a_plan_does_what_it_showed_and_a_failing_command_is_told(tmp_path: Path) -> None:
    written, made = tmp_path / "units" / "a.timer", tmp_path / "logs" / "n.log"
    old = tmp_path / "old"
    old.write_text("x")
    step = Step(("/bin/sh", "-c", f"cat > {shlex.quote(str(tmp_path / 'seen'))}"), stdin=b"words")
    plan = InstallPlan(
        "cron", ((written, b"unit"),), (step,), "", (Step(("/bin/false",), optional=True),), (old,), made
    )
    apply_plan(plan)
    assert (written.read_bytes(), (tmp_path / "seen").read_bytes()) == (b"unit", b"words")
    assert made.parent.is_dir()
    assert not old.exists()
    with pytest.raises(NodeUnfitError, match="exit status 3") as caught:
        apply_plan(InstallPlan("cron", (), (Step(("/bin/sh", "-c", "echo sorry >&2; exit 3")),), ""))
    assert caught.value.details == "sorry\n"
    with pytest.raises(NodeUnfitError, match="127"):
        apply_plan(InstallPlan("cron", (), (Step((str(tmp_path / "absent"),)),), ""))
