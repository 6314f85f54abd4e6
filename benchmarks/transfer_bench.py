"""What every scenario works with: where files and sites lie, what is said, and the list of goals."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.transfer_link import LinkShape, open_link, why_not
from benchmarks.transfer_run import Figures, Goal
from benchmarks.transfer_site import Site, open_site

MIB = 1024 * 1024


@dataclasses.dataclass
class Bench:
    """What a scenario needs. `say` prints a line of the report, `tell` one about the progress."""

    folder: Path
    size: int
    far_size: int
    repeats: int
    rival_limit_s: float
    say: Callable[[str], None]
    tell: Callable[[str], None]
    goals: list[Goal] = dataclasses.field(default_factory=list)
    _serial: int = 0

    @contextlib.contextmanager
    def site(self, shape: LinkShape) -> Iterator[Site]:
        """A fresh site over a link of this shape; its folder goes when it is closed."""
        self._serial += 1
        folder = self.folder / f"s{self._serial}"
        try:
            with open_link(shape, self.folder) as link, open_site(folder, link) as site:
                yield site
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def skip(self, shape: LinkShape) -> bool:
        reason = why_not(shape)
        if reason is not None:
            self.say(f"Not measured here: {shape.name} {reason}.")
        return reason is not None

    def goal(self, what: str, wanted: str, measured: str, reached: bool | None) -> None:
        self.goals.append(Goal(what, wanted, measured, reached))

    def ratio_goal(self, what: str, ours: Figures, theirs: Figures | None, wanted: float) -> None:
        if theirs is None:
            self.goal(what, f"{wanted:g} ×", "", None)
            return
        ratio = ours.median / theirs.median
        self.goal(what, f"{wanted:g} ×", f"{ratio:.2f} ×", ratio >= wanted)


def mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
