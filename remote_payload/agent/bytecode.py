"""The payload compiled: the zipapp once more with bytecode of what the agent imports, for one interpreter.

Python keeps no bytecode of what it imports from an archive, and compiles it at each start: most of what a verb took.
The archive's own `__main__` looks for the compiled one beside it; without it all works as well, only later.
"""

from __future__ import annotations

import contextlib
import marshal
import os
from importlib.util import MAGIC_NUMBER, source_hash
from typing import Optional

_COMPILED = (
    "remote_payload/__init__.py",
    "remote_payload/__main__.py",
    "remote_payload/agent/",
    "remote_payload/wire/",
)
"""The rest is imported beside torch, where compiling it is not what takes the time."""
_HASH_BASED_UNCHECKED = (1).to_bytes(4, "little")


def compiled_path(archive: str) -> str:
    """Where this interpreter's compiled twin of the zipapp lies."""
    return f"{archive}.{MAGIC_NUMBER.hex()}"


def source_archive(path: str) -> str:
    """The zipapp itself, of the path of it or of its compiled twin."""
    return path[: -len(compiled_path(""))] if path.endswith(compiled_path("")) else path


def compile_archive(archive: Optional[str], payloads: str) -> bool:
    """Make the compiled twin of an archive in the folder `payloads` where it is missing; whether it was made.

    A folder that cannot be written, or a full disk, is no reason to fail. None: we do not run from an archive.
    """
    if archive is None or os.path.realpath(os.path.dirname(archive)) != os.path.realpath(payloads):
        return False
    if os.path.exists(compiled_path(archive)):
        return False
    with contextlib.suppress(OSError):
        _write_compiled(archive)
        return True
    return False


def _write_compiled(archive: str) -> None:
    import zipfile

    folder, name = os.path.split(compiled_path(archive))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as target:
            for member in source.namelist():
                text = source.read(member)
                target.writestr(member, text)  # tracebacks show it
                if member.startswith(_COMPILED) and member.endswith(".py"):
                    target.writestr(member + "c", _bytecode(text, f"{archive}/{member}"))
        os.chmod(temporary, 0o600)
        os.rename(temporary, compiled_path(archive))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _bytecode(source: bytes, path: str) -> bytes:
    """As a `.pyc` file holds it (PEP 552): by hash, and believed unchecked, since the archive never changes."""
    code = compile(source, path, "exec", dont_inherit=True)
    return MAGIC_NUMBER + _HASH_BASED_UNCHECKED + source_hash(source) + marshal.dumps(code)
