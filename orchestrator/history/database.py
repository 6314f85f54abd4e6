"""Opening the one SQLite file that journal, history and nightly state share."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import ConfigurationError, InternalError, LockedError

BUSY_TIMEOUT_S = 30.0
_RETRY_S = 0.02
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "9p", "beegfs", "gpfs"}
)
_MOUNTS = Path("/proc/mounts")


@contextlib.contextmanager
def open_database(path: Path, schema: str, *, component: str, version: int) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit mode with `schema` applied, creating the file for this user alone if need be.

    `component` prefixes the tables; its `<component>_meta` records `version`, since the file's own version number is
    not ours alone. Raises `ConfigurationError` where a newer remote-eval wrote it, `LockedError` where another process
    holds the file for longer than the busy timeout, `InternalError` where SQLite cannot use it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _mapped(path), contextlib.closing(_connect(f"{_uri(path)}?mode=rwc")) as connection:
        path.chmod(0o600)
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        if _version(connection, component) != version:
            _migrate(connection, schema, component, version, path)
        yield connection


@contextlib.contextmanager
def read_database(path: Path, *, component: str, version: int) -> Iterator[sqlite3.Connection | None]:
    """A connection that cannot write, or None where nothing was ever recorded. Works while another process writes."""
    if not path.is_file():
        yield None
        return
    with _mapped(path), contextlib.closing(_connect(f"{_uri(path)}?mode=ro")) as connection:
        known = _version(connection, component)
        _refuse_newer(known, version, path)
        yield connection if known is not None else None


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, with the write lock from the start, so that what was read cannot change before it is written."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def network_file_system(folder: Path, mounts: str) -> str | None:
    """The type of the network file system that `folder` lies on, by the text of /proc/mounts; None for a local one."""
    target = folder.parts
    best: tuple[int, str] = (0, "")
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        where = Path(_unescape(fields[1])).parts
        if len(where) >= best[0] and target[: len(where)] == where:
            best = (len(where), fields[2])
    kind = best[1]
    return kind if kind in _NETWORK_FILE_SYSTEMS or kind == "fuse.sshfs" else None


def file_system_warning(folder: Path) -> str | None:
    """A sentence to show where `folder` lies on a network file system, on which SQLite's locks cannot be relied on."""
    if not sys.platform.startswith("linux") or not _MOUNTS.is_file():
        return None
    kind = network_file_system(folder.resolve(), _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))
    if kind is None:
        return None
    return (
        f"{folder} is on a network file system ({kind}), where the journal's locks cannot be relied on: "
        "set REMOTE_EVAL_HOME to a folder on a local disk"
    )


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Have the file's log written ahead, waiting for other processes that open it at this moment, too."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Two that change a new file's mode at once would wait for each other, so SQLite refuses one without a wait.
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _uri(path: Path) -> str:
    return path.absolute().as_uri()


def _version(connection: sqlite3.Connection, component: str) -> int | None:
    table = f"{component}_meta"
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
    if known is None:
        return None
    row = connection.execute(f"SELECT value FROM {table} WHERE key = 'schema_version'").fetchone()  # noqa: S608
    return int(row[0]) if row else None


def _migrate(connection: sqlite3.Connection, schema: str, component: str, version: int, path: Path) -> None:
    with transaction(connection):
        _refuse_newer(_version(connection, component), version, path)
        for statement in schema.split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"CREATE TABLE IF NOT EXISTS {component}_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        connection.execute(
            f"INSERT OR REPLACE INTO {component}_meta (key, value) VALUES ('schema_version', ?)",  # noqa: S608
            (str(version),),
        )


def _refuse_newer(known: int | None, version: int, path: Path) -> None:
    if known is not None and known > version:
        raise ConfigurationError(
            f"{path} was written by a newer remote-eval (schema {known}, this one knows {version})",
            action="Upgrade remote-eval, or set REMOTE_EVAL_HOME to another folder.",
        )


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if _is_locked(error):
            raise LockedError(f"{path} is held by another process", action="Try again when it has ended.") from error
        raise InternalError(f"cannot use {path}: {error}", action="Check space and owner of the file.") from error
    except sqlite3.Error as error:
        raise InternalError(
            f"cannot use {path}: {error}",
            action="If the file is damaged, move it away; `remote-eval history --rebuild` fills the history anew.",
        ) from error


def _is_locked(error: sqlite3.OperationalError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    # Python 3.10 has no error codes: there SQLite's own fixed text is all that tells a lock from the rest. The lower
    # eight bits are the code, the others a reason (recovery, snapshot).
    return code & 0xFF in (5, 6) if code is not None else str(error).startswith("database is locked")


def _unescape(field: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, character)
    return field
