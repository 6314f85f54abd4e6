"""What the globals that a pickle may name are to us. The lists are the policy; everything not on them is unsafe."""

from __future__ import annotations

import re
from typing import Optional

from remote_payload.checkpoint import dtypes
from remote_payload.checkpoint.inert import Symbol, Trust

_INERT = {
    "argparse": ("Namespace",),
    "builtins": ("object", "range", "slice", "int", "float", "str", "bool", "complex"),
    "types": ("SimpleNamespace",),
    "typing": ("Any",),
    "uuid": ("UUID",),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "numpy": ("ndarray",),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata", "Node"),
    "omegaconf.nodes": (
        "AnyNode",
        "StringNode",
        "IntegerNode",
        "FloatNode",
        "BooleanNode",
        "EnumNode",
        "PathNode",
        "BytesNode",
    ),
    "easydict": ("EasyDict",),
    "addict.addict": ("Dict",),
    "yacs.config": ("CfgNode",),
    "ml_collections.config_dict.config_dict": ("ConfigDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "torch": (
        "device",
        "Tensor",
        "per_tensor_affine",
        "per_channel_affine",
        "strided",
        "sparse_coo",
        "sparse_csr",
        "contiguous_format",
        "preserve_format",
        "channels_last",
    ),
    "torch.nn.parameter": ("Parameter", "Buffer"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch._C": ("Generator",),
    "torch.serialization": ("_get_layout",),
    "torch._utils": (
        "_rebuild_sparse_tensor",
        "_rebuild_nested_tensor",
        "_rebuild_wrapper_subclass",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
    ),
    "torch.jit._pickle": (
        "build_intlist",
        "build_doublelist",
        "build_boollist",
        "build_tensorlist",
        "restore_type_tag",
    ),
}
_MODULE_CLASS = re.compile(r"torch\.nn\.modules\.\w+\.[A-Z]\w*\Z|__torch__(\.\w+)+\Z")
"""torch's own layers, and TorchScript's classes, which are no Python and exist only inside their archive."""

_DANGEROUS_MODULES = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "importlib", "runpy", "socket", "shutil", "ctypes", "pty", "code"}
    | {"codeop", "pickle", "_pickle", "webbrowser", "multiprocessing", "asyncio", "signal", "threading", "platform"}
    | {"commands", "pdb", "timeit", "cProfile", "profile", "pip", "http", "urllib", "requests", "operator"}
    | {"functools", "torch.hub", "torch.utils.cpp_extension", "numpy.testing"}
)
_DANGEROUS_BUILTINS = frozenset(
    {"eval", "exec", "compile", "open", "getattr", "setattr", "delattr", "__import__", "input", "breakpoint", "vars"}
)


def trust_of(module: str, name: str) -> Trust:
    """What a global is to us that no handler imitates. Dotted names are paths through attributes: never trusted."""
    full_name = f"{module}.{name}"
    if "." in name:
        return Trust.UNSAFE
    if storage_dtype(module, name) or named_dtype(module, name):
        return Trust.KNOWN
    if name in _INERT.get(module, ()) or _MODULE_CLASS.match(full_name):
        return Trust.INERT
    return Trust.UNSAFE


def harmless_globals() -> frozenset[str]:
    """Every global that is known to be inert, or that names a type; torch's own layers are known by their form."""
    named = {f"{module}.{name}" for module, names in _INERT.items() for name in names}
    storages = {f"torch.{name}" for name in dtypes.STORAGE_DTYPES}
    types = {f"torch.{name}" for name in (*dtypes.ITEM_BYTES, *dtypes.TORCH_ALIASES)}
    return frozenset(named | storages | types)


def is_dangerous(symbol: Symbol) -> bool:
    """Known ways to run code or to reach out, as opposed to classes that merely are not on the list."""
    if symbol.module == "builtins":
        return symbol.name in _DANGEROUS_BUILTINS
    parts = symbol.module.split(".")
    return any(".".join(parts[: n + 1]) in _DANGEROUS_MODULES for n in range(len(parts)))


def storage_dtype(module: str, name: str) -> Optional[str]:
    """The element type of a storage class, None if it is none."""
    if module in ("torch", "torch.cuda", "torch.storage"):
        return dtypes.STORAGE_DTYPES.get(name)
    return None


def named_dtype(module: str, name: str) -> Optional[str]:
    """`torch.float32` and its like, None for anything else."""
    if module != "torch":
        return None
    name = dtypes.TORCH_ALIASES.get(name, name)
    return name if name in dtypes.ITEM_BYTES else None
