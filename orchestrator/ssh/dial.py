"""A ProxyCommand of our own that opens the socket of a bulk connection and hands it to `ssh` (ProxyUseFdpass).

    python -I -S dial.py HOST PORT any|inet|inet6 TIMEOUT_S FACTS_FILE

Run by path, with nothing of ours importable. The data then flows without passing through here; what is gained is the
choice of congestion control. The file gets its name, or `-`, and the path's round trip in microseconds.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import sys
from pathlib import Path

_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
_LONG_PATH_US = 3000
"""On shorter paths loss means a full queue, which any congestion control fills; BBR's pacing only costs time there."""
_NOT_SENT_BYTES = 1024 * 1024
_RTT_OFFSET, _LEAST_RTT_OFFSET = 68, 148
_TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def main(arguments: list[str]) -> None:
    host, port, family, timeout_s, facts = arguments
    connection = _connect(host, int(port), _FAMILIES[family], float(timeout_s))
    connection.settimeout(None)
    Path(facts).write_text(_tune(connection), encoding="ascii")
    with socket.socket(fileno=1) as ssh:
        fds = array.array("i", [connection.fileno()])
        ssh.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds.tobytes())])


def _connect(host: str, port: int, family: int, timeout_s: float) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise _failure(f"ssh: Could not resolve hostname {host}: {error.strerror}") from None
    last = "Connection refused"
    for place in found:
        connection = socket.socket(place[0], place[1], place[2])
        connection.settimeout(timeout_s)
        try:
            connection.connect(place[4])
        except TimeoutError:
            last = "Connection timed out"
        except OSError as error:
            last = error.strerror or str(error)
        else:
            return connection
        connection.close()
    raise _failure(f"ssh: connect to host {host} port {port}: {last}")


def _tune(connection: socket.socket) -> str:
    """Choose what the kernel has and allows; returns the congestion control's name and the round trip, or nothing where
    they cannot be known."""
    if not sys.platform.startswith("linux"):
        return ""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES)
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        (rtt_us,) = struct.unpack_from("=I", info, _RTT_OFFSET)
        with contextlib.suppress(OSError):
            if rtt_us >= _LONG_PATH_US:
                connection.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, b"bbr")
        name = connection.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, 16).partition(b"\0")[0].decode("ascii")
    except (OSError, struct.error):
        return ""
    return f"{name or '-'} {rtt_us}"


def least_round_trip_s(connection: socket.socket) -> float | None:
    """The shortest that the connection has seen, without the waits of a busy machine; None where it is not known."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LEAST_RTT_OFFSET + 4)
        (rtt_us,) = struct.unpack_from("=I", info, _LEAST_RTT_OFFSET)
    except (AttributeError, OSError, struct.error):
        return None
    return float(rtt_us) / 1e6


def _failure(words: str) -> SystemExit:
    """Ends the program with words that OpenSSH's own client would have said."""
    sys.stderr.write(words + "\n")
    return SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
