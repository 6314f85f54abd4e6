"""Compiles and launches CUDA C++ with what comes with torch: NVRTC and the driver, through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remote_payload.health.kept import forget_old, own_folder, read_kept, write_kept

_MAX_DYNAMIC_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


class CompilerUnavailableError(RuntimeError):
    """There is no NVRTC here, or it does not know this GPU: the CPU does the work instead."""


class CudaModule:
    """Kernels of one source on one device. The device's context must be current where they are launched.

    `stream` is a `cuda_stream`, a handle.
    """

    def __init__(self, source: str, names: Sequence[str], device: torch.device) -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            try:
                # Calls that only queue work keep the interpreter: sixteen threads that let go of it a dozen times a
                # block would wait for one another longer than for the disk.
                self._driver = _load_driver()
            except OSError as error:
                raise CompilerUnavailableError(str(error)) from error
            self._module = ctypes.c_void_p()
            self._load(source, torch.cuda.get_device_capability(device))
            self._functions = {n: self._function(n) for n in names}

    def allow_shared_bytes(self, name: str, count: int) -> None:
        """Let a kernel ask for more shared memory than every GPU has. Raises `CompilerUnavailableError`."""
        self._check(self._driver.cuFuncSetAttribute(self._functions[name], _MAX_DYNAMIC_SHARED_BYTES, count))

    def launch(
        self, name: str, blocks: int, threads: int, arguments: Sequence[Any], stream: int, shared_bytes: int = 0
    ) -> None:
        """Queue a kernel on a stream; arguments are ctypes values. Raises `RuntimeError` if it cannot start."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        function = self._functions[name]
        code = self._driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, pointers, None)
        _check_queued(f"kernel {name}", code)

    def copy_in(self, device: int, host: int, count: int, stream: int) -> None:
        """Queue a copy of `count` bytes from pinned memory to the device; both are addresses."""
        if count:
            _check_queued("a copy to the device", self._driver.cuMemcpyHtoDAsync_v2(device, host, count, stream))

    def copy_out(self, host: int, device: int, count: int, stream: int) -> None:
        """Queue a copy of `count` bytes from the device to pinned memory; both are addresses."""
        if count:
            _check_queued("a copy from the device", self._driver.cuMemcpyDtoHAsync_v2(host, device, count, stream))

    def clear(self, device: int, count: int, stream: int) -> None:
        """Queue the zeroing of `count` bytes on the device."""
        if count:
            _check_queued("a memset", self._driver.cuMemsetD8Async(device, 0, count, stream))

    def _load(self, source: str, capability: tuple[int, int]) -> None:
        """Machine code that was kept, or else is made now and kept: compiling takes longer than reading 10 GB."""
        folder = own_folder()
        path = None if folder is None else os.path.join(folder, f"cuda-{_key(source, capability)}.cubin")
        kept = None if path is None else read_kept(path)
        if kept is None or self._driver.cuModuleLoadData(ctypes.byref(self._module), kept):
            image = compile_source(source, capability)
            self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), image))
            if path is not None:
                write_kept(path, image)
        if path is not None:
            forget_old(path)

    def _function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
        return function

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise CompilerUnavailableError(f"CUDA error {code} while kernels were loaded")


def _key(source: str, capability: tuple[int, int]) -> str:
    parts = (source, *_options(capability), str(torch.__version__), str(torch.version.cuda))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _options(capability: tuple[int, int]) -> tuple[str, ...]:
    return f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++14"


def _load_driver() -> ctypes.PyDLL:
    """The driver, told its arguments' types once: a block makes a dozen calls. Raises `OSError`."""
    driver = ctypes.PyDLL("libcuda.so.1")
    address, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [address, *[number] * 7, *[address] * 3]
    driver.cuMemcpyHtoDAsync_v2.argtypes = [address, address, ctypes.c_size_t, address]
    driver.cuMemcpyDtoHAsync_v2.argtypes = [address, address, ctypes.c_size_t, address]
    driver.cuMemsetD8Async.argtypes = [address, ctypes.c_ubyte, ctypes.c_size_t, address]
    return driver


def _check_queued(what: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{what} could not be started: CUDA error {code}")


def compile_source(source: str, capability: tuple[int, int]) -> bytes:
    """Machine code for a GPU of that compute capability. Raises `CompilerUnavailableError`."""
    library = _load_nvrtc()
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"health.cu", 0, None, None):
        raise CompilerUnavailableError("NVRTC takes no program")
    try:
        options = [option.encode() for option in _options(capability)]
        if library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            raise CompilerUnavailableError(_log(library, program))
        size = ctypes.c_size_t()
        if library.nvrtcGetCUBINSize(program, ctypes.byref(size)) or not size.value:
            raise CompilerUnavailableError("NVRTC made no machine code")
        image = ctypes.create_string_buffer(size.value)
        if library.nvrtcGetCUBIN(program, image):
            raise CompilerUnavailableError("NVRTC made no machine code")
        return image.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value or 1)
    library.nvrtcGetProgramLog(program, text)
    return text.value.decode("utf-8", "replace")[:2000]


def _load_nvrtc() -> ctypes.CDLL:
    for candidate in _candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CompilerUnavailableError("no libnvrtc was found")


def _candidates() -> Iterator[str]:
    """The one that torch brought, then the system's."""
    major = (torch.version.cuda or "12").split(".")[0]
    folders = [Path(torch.__file__).parent / "lib"]
    for entry in sys.path:
        nvidia = Path(entry or ".") / "nvidia"
        folders.extend(f for f in (nvidia / "cuda_nvrtc" / "lib", nvidia / f"cu{major}" / "lib") if f.is_dir())
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders.append(Path(home) / "lib64")
    for folder in folders:
        yield from sorted(str(p) for p in folder.glob(f"libnvrtc.so.{major}*"))
        # Some of torch's wheels add a hash to the name.
        yield from sorted(str(p) for p in folder.glob(f"libnvrtc-*.so.{major}*") if "builtins" not in p.name)
    yield f"libnvrtc.so.{major}"
    yield "libnvrtc.so"
