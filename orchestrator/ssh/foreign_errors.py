"""The one place where exceptions of paramiko, Fabric's invoke, sockets and the system become ours.

Types and codes decide. What a lost connection means is the caller's to say: before a login it is a network that can be
tried again, under way it is `ConnectionLostError`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from orchestrator.errors import (
    CommandTimeoutError,
    ConfigurationError,
    ConnectionLostError,
    InternalError,
    RemoteEvalError,
    UnreachableError,
)

_NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EADDRNOTAVAIL}
_DROPPED = {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ESHUTDOWN, errno.EBADF, errno.ENOTCONN}
# EAI_AGAIN is a name server that did not answer; the others are its answer.
_NAME_UNKNOWN = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME), socket.EAI_FAIL}


def while_connecting(error: BaseException, target: str) -> RemoteEvalError:
    """Ours for what was raised between the first packet and the end of the login, authentication apart."""
    if isinstance(error, RemoteEvalError):
        return error
    words = str(error)
    if isinstance(error, socket.gaierror):
        return _name_error(error, target)
    if isinstance(error, (TimeoutError, socket.timeout)) or _errno(error) == errno.ETIMEDOUT:
        return UnreachableError(
            f"{target} did not answer in time",
            action="Check that the machine is up, and that the VPN or jump host that leads to it works.",
            details=words,
        )
    if _errno(error) == errno.ECONNREFUSED:
        return UnreachableError(
            f"{target} refuses connections on this port",
            action="Check the port in the profile, and that sshd runs there.",
            details=words,
        )
    if _errno(error) in _NO_ROUTE:
        return UnreachableError(
            f"there is no route to {target}", action="Check the network here, and the VPN.", details=words
        )
    return _protocol_error(error, target)


def under_way(error: BaseException, target: str, doing: str) -> RemoteEvalError:
    """Ours for what was raised on an established connection. `doing`: what was under way, as in "while …"."""
    if isinstance(error, RemoteEvalError):
        return error
    if isinstance(error, (TimeoutError, socket.timeout)):
        return CommandTimeoutError(f"{target} did not answer in time while {doing}", details=str(error))
    if isinstance(error, (OSError, EOFError)) or _is_paramiko(error) or _is_invoke(error):
        return ConnectionLostError(
            f"the connection to {target} was lost while {doing}",
            action="Nothing is lost: the job goes on by itself, and `remote-eval resume` picks it up.",
            details=str(error) or type(error).__name__,
        )
    return InternalError(f"unexpected {type(error).__name__} while {doing}", details=str(error))


@contextlib.contextmanager
def mapped(target: str, doing: str) -> Iterator[None]:
    """Raise ours in place of anything foreign from an established connection."""
    try:
        yield
    except RemoteEvalError:
        raise
    except Exception as error:
        raise under_way(error, target, doing) from error


@contextlib.contextmanager
def mapped_connecting(target: str) -> Iterator[None]:
    """Raise ours in place of anything foreign from connecting."""
    try:
        yield
    except RemoteEvalError:
        raise
    except Exception as error:
        raise while_connecting(error, target) from error


def dropped_before_login(target: str, words: str = "") -> UnreachableError:
    """The server took the connection and closed it before any login: full (MaxStartups), guarded or not SSH."""
    return UnreachableError(
        f"{target} closed the connection before the login began",
        action="This is how a busy server (MaxStartups), or one that guards itself against many logins, turns away; "
        "it is tried again. If it lasts, ask its administrator.",
        details=words,
    )


def _name_error(error: socket.gaierror, target: str) -> UnreachableError:
    if error.errno in _NAME_UNKNOWN:
        return UnreachableError(
            f"no name server knows the host of {target}",
            action="Check the spelling of `host` in the profile (or its HostName in ~/.ssh/config), and the VPN.",
            details=str(error),
        )
    return UnreachableError(
        f"the name of {target} could not be looked up", action="Check the network here.", details=str(error)
    )


def _protocol_error(error: BaseException, target: str) -> RemoteEvalError:
    if _is_paramiko(error):
        import paramiko

        # paramiko hides what ended the banner exchange behind an SSHException; the chained exception has the type.
        inner = error.__context__
        if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
            return while_connecting(next(iter(error.errors.values())), target)
        if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
            return ConfigurationError(
                f"{target} and paramiko have no algorithm in common",
                action="Set `transport: openssh` in the profile.",
                details=str(error),
            )
        if isinstance(inner, (TimeoutError, socket.timeout)):
            return while_connecting(inner, target)
        return dropped_before_login(target, str(error))
    if isinstance(error, EOFError) or _errno(error) in _DROPPED:
        return dropped_before_login(target, str(error))
    if isinstance(error, OSError):
        return UnreachableError(f"{target} cannot be reached: {error.strerror or error}", details=str(error))
    return InternalError(f"unexpected {type(error).__name__} while connecting to {target}", details=str(error))


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _is_paramiko(error: BaseException) -> bool:
    import paramiko

    return isinstance(error, (paramiko.SSHException, paramiko.ssh_exception.NoValidConnectionsError))


def _is_invoke(error: BaseException) -> bool:
    import invoke

    return isinstance(error, (invoke.exceptions.UnexpectedExit, invoke.exceptions.Failure))
