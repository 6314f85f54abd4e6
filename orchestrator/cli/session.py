"""What every command shares: folders and services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.layout import LocalLayout

if TYPE_CHECKING:
    from orchestrator.journal import Journal
    from orchestrator.pipeline.context import Services
    from orchestrator.plan import RunPlan


def services(*, quiet: bool = False, as_json: bool = False, bandwidth_limit_mbps: float | None = None) -> Services:
    """`as_json`: what happens is told to a program, in lines on stderr; `quiet`: to nobody."""
    from orchestrator.cli.output import ConsoleReporter, JsonReporter, ask_on_terminal
    from orchestrator.pipeline.world import make_services

    reporter = JsonReporter() if as_json else ConsoleReporter(quiet=quiet)
    return make_services(LocalLayout.for_user(), reporter, ask_on_terminal, bandwidth_limit_mbps)


def journal() -> Journal:
    from orchestrator.journal import Journal

    return Journal(LocalLayout.for_user().database)


def plan_of(run_id: str | None) -> RunPlan:
    """The plan of `run_id`; of the newest run where none is named."""
    from orchestrator.errors import UsageError
    from orchestrator.pipeline.run import load_plan

    layout = LocalLayout.for_user()
    if run_id is None:
        known = journal().run_ids()
        if not known:
            raise UsageError("there is no run yet", action="Start one: remote-eval --cluster C --checkpoint REF.")
        run_id = known[0]
    return load_plan(run_id, layout)
