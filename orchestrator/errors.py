"""The exception tree. Each error says what happened, who can mend it and what to do next, and has one exit code."""

from __future__ import annotations

import enum
from typing import ClassVar


class ExitCode(enum.IntEnum):
    DONE = 0
    VERDICT_FAIL = 1
    USAGE = 2
    AUTHENTICATION = 3
    UNREACHABLE = 4
    NODE_UNFIT = 5
    JOB_FAILED = 6
    INTEGRITY = 7
    INTERNAL = 70
    DEFERRED = 75
    INTERRUPTED = 130


class Owner(str, enum.Enum):
    """Who can mend it."""

    YOU = "you"
    NETWORK = "network"
    HOST = "host"
    JOB = "job"
    US = "us"


class RemoteEvalError(Exception):
    """Base of everything this program raises on purpose.

    `str(error)` is the cause in one sentence; `action` is the next thing to do; `details` holds the other side's own
    words (untrusted: print through `printable`).
    """

    owner: ClassVar[Owner] = Owner.US
    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(self, cause: str, *, action: str = "", details: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.action = action
        self.details = details


class UsageError(RemoteEvalError):
    """What was asked for cannot be done as asked: a wrong flag, name or file."""

    owner = Owner.YOU
    exit_code = ExitCode.USAGE


class ConfigurationError(UsageError):
    """A profile, config or project file does not hold what it should; the cause names file, line and field."""


class CheckpointError(UsageError):
    """The checkpoint is missing, is no checkpoint, or cannot be read without executing something in it."""


class AuthenticationError(RemoteEvalError):
    """The server does not accept us. Never retried."""

    owner = Owner.YOU
    exit_code = ExitCode.AUTHENTICATION


class HostKeyError(AuthenticationError):
    """The server's host key is unknown or has changed. Never accepted by itself."""


class LoginRefusedError(AuthenticationError):
    """The server refused the keys, the user or the code that it was offered."""


class UnreachableError(RemoteEvalError):
    """No answer from the node, for as long as the profile's patience lasted. The run is paused and can be resumed."""

    owner = Owner.NETWORK
    exit_code = ExitCode.UNREACHABLE


class ConnectionLostError(UnreachableError):
    """The connection ended while something was under way; what became of that is not known from this alone."""


class CommandTimeoutError(UnreachableError):
    """The node accepted a command and did not answer within its limit."""


class NodeUnfitError(RemoteEvalError):
    """The node answers and cannot do the job: no space, no GPU, no Python, no torch, no write access."""

    owner = Owner.HOST
    exit_code = ExitCode.NODE_UNFIT


class NoSpaceError(NodeUnfitError):
    """The node's disk, the quota there or the store's limit does not hold what is to come."""


class ProtocolMismatchError(NodeUnfitError):
    """Agent and client are of different protocol versions, or the answer was none of ours."""

    owner = Owner.YOU


class JobFailedError(RemoteEvalError):
    """The job ended and did not succeed; its logs, stacks and partial results are collected."""

    owner = Owner.JOB
    exit_code = ExitCode.JOB_FAILED


class JobCancelledError(JobFailedError):
    """The job was cancelled."""

    owner = Owner.YOU


class AttemptLostError(JobFailedError):
    """The supervisor is gone without a terminal record: killed, or its machine restarted."""

    owner = Owner.HOST


class IntegrityError(RemoteEvalError):
    """Bytes are not what their digest says."""

    owner = Owner.HOST
    exit_code = ExitCode.INTEGRITY


class LockedError(RemoteEvalError):
    """Another remote-eval is at this run or target now."""

    owner = Owner.YOU
    exit_code = ExitCode.DEFERRED


class InternalError(RemoteEvalError):
    """Our own mistake. The log file has the traceback."""

    def __init__(self, cause: str, *, action: str = "", details: str = "") -> None:
        action = action or "This is a bug of remote-eval: report it with client.log of its data folder."
        super().__init__(cause, action=action, details=details)
