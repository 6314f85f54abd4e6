"""What `dial` writes of a connection, as it is read again, and from a real one."""

from __future__ import annotations

import re
import socket
import sys

import pytest

from orchestrator.ssh import dial
from orchestrator.ssh.bulk import dial_facts
from orchestrator.ssh.transport import StreamFacts


@pytest.mark.parametrize(
    ("said", "facts"),
    [
        ("bbr 60123", StreamFacts("ssh", "bbr", 0.060123)),
        ("- 12\n", StreamFacts("ssh", None, 12e-6)),
        ("", StreamFacts("ssh")),
        ("bbr", StreamFacts("ssh")),
        ("bbr many", StreamFacts("ssh")),
    ],
)
def test_what_dial_wrote_is_read(said: str, facts: StreamFacts) -> None:
    assert dial_facts(said) == facts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is chosen and nothing is said")
def test_a_real_connection_has_a_congestion_control_and_a_round_trip() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        said = dial._tune(near)
    assert re.fullmatch(r"[a-z0-9_]+ [0-9]+", said), said
    facts = dial_facts(said)
    assert facts.round_trip_s is not None
    assert facts.round_trip_s < 0.1
