"""How a script reaches `/bin/sh` on the node: pure text.

The login shell parses only a fixed command of plain ASCII, which means the same to sh, csh and fish. The script itself
is one compound command: a shell runs it only when its end has arrived, so a connection cut in the middle runs nothing.
"""

from __future__ import annotations

REMOTE_COMMAND = "/bin/sh -c '/bin/sh; exit $?'"
"""The outer shell turns death by signal n into exit status 128 + n, which both transports can carry."""

_SSH_FAILED = 255


def marked_command(nonce: str) -> str:
    """`REMOTE_COMMAND` that also marks an exit status of 255 on standard error, since OpenSSH's client uses that number
    for its own failures."""
    return f"/bin/sh -c '/bin/sh; s=$?; if [ $s = 255 ]; then echo ={nonce}=255= >&2; fi; exit $s'"


def split_mark(nonce: str, status: int, stderr: bytes) -> tuple[int | None, bytes]:
    """(exit status or None where it was the client that failed, standard error without the mark)."""
    if status != _SSH_FAILED:
        return status, stderr
    mark = f"={nonce}=255=\n".encode()
    place = stderr.rfind(mark)
    if place < 0:
        return None, stderr
    return _SSH_FAILED, stderr[:place] + stderr[place + len(mark) :]


def script_bytes(script: str) -> bytes:
    """What is written for a script whose commands find their standard input at end of file."""
    return _compound(script, "</dev/null")


def stream_script_bytes(script: str) -> bytes:
    """What is written for a script that reads the channel's own standard input."""
    return _compound(script, "")


def _compound(script: str, redirection: str) -> bytes:
    # `exit` stands inside: behind the brace a program that reads standard input would be given it as data.
    return f"{{ :\n{script}\n\nexit $?\n}} {redirection}\n".encode("utf-8", "surrogateescape")
