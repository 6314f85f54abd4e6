"""The pass on the CPU by compiled C: compiled once for this processor, kept, and loaded. Without a compiler, None."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Optional

from remote_payload.health import native_source as source
from remote_payload.health.distribution import Array
from remote_payload.health.kept import forget_old, is_ours, own_folder

MIN_BYTES = 64 << 20
"""Below this a checkpoint is read before a compiler has ended. By size alone, so that numbers never depend on luck."""
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}

_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_LIMIT_S = 60.0
_MOST_WORDS = 300
# Contraction would round a step once where Adam's arithmetic rounds twice.
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
)
_NATIVE = ("-march=native",)


class PieceArguments(ctypes.Structure):
    """`Piece` of the C source."""

    _fields_ = [
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("nan_count", ctypes.c_int32),
        ("inf_count", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("counts", ctypes.c_void_p),
        ("moments", ctypes.c_void_p),
        ("columns", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("squares", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("hashes", ctypes.c_void_p),
        ("alive", ctypes.c_void_p),
        ("multipliers", ctypes.c_void_p),
        ("nan", ctypes.c_uint64 * source.LOCATIONS),
        ("inf", ctypes.c_uint64 * source.LOCATIONS),
    ]


class SpanArguments(ctypes.Structure):
    """`Span` of the C source."""

    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("file", ctypes.c_int32),
        ("wants_crc", ctypes.c_int32),
        ("crc", ctypes.c_uint32),
        ("pieces", ctypes.c_int32),
        ("piece", ctypes.POINTER(PieceArguments)),
    ]


class JobArguments(ctypes.Structure):
    """`Job` of the C source."""

    _fields_ = [
        ("spans", ctypes.c_int32),
        ("has_joint", ctypes.c_int32),
        ("span", ctypes.POINTER(SpanArguments)),
        ("rate", ctypes.c_float),
        ("rate_at_peak", ctypes.c_float),
        ("root", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("joint", ctypes.c_uint64 * 7),
        ("scratch", ctypes.c_void_p),
    ]


class NativeKernels:
    """The loaded library. Its calls let other threads run."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self._run = library.run
        self._run.argtypes = [ctypes.POINTER(JobArguments)]
        self._checksum = library.checksum
        self._checksum.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self._checksum.restype = ctypes.c_uint32
        self.rounds_half = bool(library.has_half())
        """Whether the joint counts of a float16 parameter are right; not every compiler knows the type."""

    def run(self, job: JobArguments) -> int:
        """0, an error's number, or -1 for a file that ends early. The scratch must be zero, and is afterwards if 0."""
        return int(self._run(ctypes.byref(job)))

    def checksum(self, data: Array) -> int:
        """CRC-32 of an array of bytes."""
        return int(self._checksum(data.ctypes.data, data.nbytes))


@dataclasses.dataclass(frozen=True)
class NativeFound:
    """The kernels, or in a sentence why there are none."""

    kernels: Optional[NativeKernels] = None
    why_not: str = ""


@functools.lru_cache(maxsize=1)
def find_native() -> NativeFound:
    """Compile if need be, and load; without kernels where there is no compiler or what it makes does not load.

    What was compiled is kept in a folder that only this user can write to, under a name that holds the source, the
    compiler and the processor: homes are shared between unlike machines.
    """
    found = (shutil.which(name) for name in _COMPILERS)
    compiler = next((c for c in found if c is not None), None)
    if compiler is None:
        return NativeFound(why_not=f"no C compiler was found: none of {', '.join(_COMPILERS)}")
    folder = own_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="remote-eval-native-") as temporary:
            return _load(compiler, os.path.join(temporary, "native.so"))
    path = os.path.join(folder, f"native-{_key(compiler)}.so")
    loaded = _load(compiler, path)
    forget_old(path)
    return loaded


def load_native() -> Optional[NativeKernels]:
    """The kernels of `find_native`."""
    return find_native().kernels


def _load(compiler: str, path: str) -> NativeFound:
    kept = _load_kept(path) if is_ours(path) else None
    if kept is not None:
        return NativeFound(kept)
    try:
        failed = _compile(compiler, path)
        return NativeFound(why_not=failed) if failed else NativeFound(NativeKernels(path))
    except (OSError, AttributeError) as error:
        return NativeFound(why_not=f"what {compiler} made does not load: {str(error)[:_MOST_WORDS]}")


def _load_kept(path: str) -> Optional[NativeKernels]:
    """None for one that was damaged since it was made: it is made again."""
    try:
        return NativeKernels(path)
    except (OSError, AttributeError):
        return None


def _compile(compiler: str, path: str) -> str:
    """Make `path` at once as a whole; why not, if not. Another process that does the same makes the same."""
    failed = ""
    with tempfile.TemporaryDirectory(prefix=".native-", dir=os.path.dirname(path)) as folder:
        code, made = os.path.join(folder, "native.c"), os.path.join(folder, "native.so")
        with open(code, "w", encoding="utf-8") as file:
            file.write(source.SOURCE)
        for flags in (_NATIVE, ()):
            failed = _failure([compiler, *_FLAGS, *flags, "-o", made, code, "-lm"])
            if not failed:
                os.replace(made, path)
                break
    return failed


def _failure(command: Sequence[str]) -> str:
    """Run a compiler: empty if it made what it was asked for, else what went wrong."""
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_COMPILE_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_COMPILE_LIMIT_S:.0f} s"
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    words = done.stderr.decode("utf-8", "replace").strip()[:_MOST_WORDS]
    return f"{command[0]} ended with {done.returncode}: {words}" if done.returncode else ""


def _key(compiler: str) -> str:
    real = os.path.realpath(compiler)
    status = os.stat(real)
    parts = (source.SOURCE, *_FLAGS, *_NATIVE, real, str(status.st_mtime_ns), str(status.st_size), platform.machine())
    return hashlib.sha256("\0".join((*parts, _processor())).encode()).hexdigest()[:32]


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20).split("\n\n")[0]
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "features", "cpu part", "cpu implementer")
    return "\n".join(line for line in text.splitlines() if line.split(":")[0].strip().lower() in wanted)
