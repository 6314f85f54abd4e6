"""The real world behind `Services`: the user's folders, the journal, and connections made by profile."""

from __future__ import annotations

import sys
from collections.abc import Callable

from orchestrator.journal import Journal
from orchestrator.layout import LocalLayout
from orchestrator.node import Node
from orchestrator.payload import Payload
from orchestrator.pipeline.context import Reporter, Services
from orchestrator.profiles import ClusterProfile, PythonProfile
from orchestrator.ssh.settings import ConnectionSettings, Prompt
from orchestrator.ssh.transport import Transport


def make_services(
    layout: LocalLayout, reporter: Reporter, prompt: Prompt, bandwidth_limit_mbps: float | None = None
) -> Services:
    """Services over real SSH. Nothing is connected or started before a stage needs it."""
    layout.make_private(layout.data)

    def open_node(profile: ClusterProfile, payload: Payload) -> Node:
        return Node(_for_this_machine(profile, layout), payload, _connector(profile, layout, reporter, prompt))

    return Services(layout, Journal(layout.database), reporter, open_node, bandwidth_limit_mbps)


def _for_this_machine(profile: ClusterProfile, layout: LocalLayout) -> ClusterProfile:
    """The embedded node runs with this interpreter and keeps its files among ours."""
    if not profile.embedded:
        return profile
    python = profile.python if profile.python != PythonProfile() else PythonProfile(path=sys.executable)
    root = profile.node_root
    if root == ClusterProfile.model_fields["node_root"].default:
        root = str(layout.embedded_node / "root")
    return profile.model_copy(update={"python": python, "node_root": root})


def _connector(
    profile: ClusterProfile, layout: LocalLayout, reporter: Reporter, prompt: Prompt
) -> Callable[[], Transport]:
    def connect_now() -> Transport:
        from orchestrator.ssh.connect import connect

        return connect(
            _settings(profile, layout),
            profile.retry_policy(),
            prompt=prompt,
            on_retry=reporter.retry,
            sockets_folder=layout.sockets,
        )

    return connect_now


def _settings(profile: ClusterProfile, layout: LocalLayout) -> ConnectionSettings:
    if not profile.embedded:
        return profile.connection()
    from orchestrator.embedded import ensure_embedded_node

    return ensure_embedded_node(layout)
