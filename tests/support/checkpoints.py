"""Checkpoints made by code: the reference architecture at any scale, damaged files and hostile ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

REFERENCE_ENTRIES = 162
REFERENCE_PARAMETERS = 3_500_188_290

_WIDE = (  # name of the Linear, name of the BatchNorm behind it or None, inputs, outputs
    ("encoder.video_encoder.fc1", "encoder.video_encoder.bn1", 432000, 4096),
    ("encoder.video_encoder.fc2", "encoder.video_encoder.bn2", 4096, 2048),
    ("encoder.video_encoder.fc3", "encoder.video_encoder.bn3", 2048, 1024),
    ("encoder.audio_encoder.fc1", "encoder.audio_encoder.bn1", 896, 512),
    ("encoder.audio_encoder.fc2", "encoder.audio_encoder.bn2", 512, 256),
    ("encoder.text_encoder.fc1", "encoder.text_encoder.bn1", 3072, 512),
    ("encoder.text_encoder.fc2", "encoder.text_encoder.bn2", 512, 256),
    ("encoder.feature_conv.0", "encoder.feature_conv.1", 1536, 1536),
    ("encoder.layer5.0", "encoder.layer5.1", 1536, 4096),
    ("encoder.layer6.0", "encoder.layer6.1", 4096, 8000),
    ("encoder.layer7_bottleneck.0", "encoder.layer7_bottleneck.1", 8000, 2048),
    ("encoder.bottleneck_to_voxels.0", "encoder.bottleneck_to_voxels.1", 2048, 16384),
    ("encoder.bottleneck_to_voxels.4", None, 16384, 83138),
    ("decoder.layer8.0", "decoder.layer8.1", 2048, 8000),
    ("decoder.layer9.0", "decoder.layer9.1", 8000, 4096),
    ("decoder.layer10.0", "decoder.layer10.1", 4096, 2048),
    ("decoder.layer11.0", "decoder.layer11.1", 2048, 1536),
    ("decoder.layer12_video.0", "decoder.layer12_video.1", 1536, 2048),
    ("decoder.layer12_video.4", "decoder.layer12_video.5", 2048, 4096),
    ("decoder.layer12_audio.0", "decoder.layer12_audio.1", 1536, 2048),
    ("decoder.layer12_audio.4", "decoder.layer12_audio.5", 2048, 2048),
    ("decoder.layer12_text.0", "decoder.layer12_text.1", 1536, 1024),
    ("decoder.layer12_text.4", "decoder.layer12_text.5", 1024, 1024),
    ("decoder.layer13_video.0", None, 4096, 43200),
    ("decoder.layer13_audio", None, 2048, 896),
    ("decoder.layer13_text", None, 1024, 3072),
)

LAB_CONFIG = {
    "learning_rate": 1e-3,
    "batch_size": 2,
    "num_epochs": 50,
    "warmup_epochs": 10,
    "scheduler_type": "cosine",
    "min_lr": 1e-6,
    "weight_decay": 0.01,
    "gradient_clip_val": 1.0,
}


def reference_shapes(scale: int = 1) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference state dict, every width divided by `scale`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for linear, norm, inputs, outputs in _WIDE:
        width_in, width_out = max(1, inputs // scale), max(1, outputs // scale)
        shapes[f"{linear}.weight"] = (width_out, width_in)
        shapes[f"{linear}.bias"] = (width_out,)
        if norm is not None:
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{norm}.{leaf}"] = (width_out,)
            shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


def reference_checkpoint(
    scale: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    make: Callable[[str, tuple[int, ...]], torch.Tensor] | None = None,
    steps: int = 1363,
) -> dict[str, Any]:
    """A checkpoint dict of the lab's layout: weights, AdamW's moments, scheduler, config, histories.

    `make(name, shape)` gives a floating-point tensor; by default plausible healthy values.
    """
    generator = torch.Generator().manual_seed(0)

    def healthy(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            return noise.abs() + 0.5
        if len(shape) == 1 and name.endswith(".weight"):
            return 1 + 0.05 * noise
        return 0.03 * noise

    make = make or healthy
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, shape in reference_shapes(scale).items():
        counter = name.endswith("num_batches_tracked")
        state[name] = torch.tensor(steps, dtype=torch.int64) if counter else make(name, shape).to(dtype)
    parameters = [n for n in state if n.endswith((".weight", ".bias"))]
    moments = {
        index: {
            "step": torch.tensor(float(steps)),
            "exp_avg": (1e-4 * make("exp_avg", tuple(state[n].shape))).to(dtype),
            "exp_avg_sq": (1e-6 * make("exp_avg_sq", tuple(state[n].shape)).abs()).to(dtype),
        }
        for index, n in enumerate(parameters)
    }
    group = {"lr": 5.377e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "initial_lr": 1e-3}
    return {
        "epoch": 29,
        "global_step": steps,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": [{**group, "params": list(range(len(parameters)))}]},
        "scheduler_state_dict": {"last_epoch": steps, "_last_lr": [5.377e-4]},
        "best_val_loss": 167.15,
        "val_loss": 167.15,
        "config": dict(LAB_CONFIG),
        "train_history": [{"loss": 900.0 - e, "learning_rate": 1e-3} for e in range(29)],
        "val_history": [{"loss": 300.0 - e, "fmri_correlation": 0.1} for e in range(29)],
    }


def write_sparse_reference(path: Path) -> None:
    """The real-size file, 21 GB long with about a megabyte on disk: every tensor's bytes are a hole."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state: OrderedDict[str, torch.Tensor] = OrderedDict()
        for name, shape in reference_shapes().items():
            dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.bfloat16
            state[name] = torch.empty(shape, dtype=dtype)
        parameters = [n for n in state if n.endswith((".weight", ".bias"))]
        moments = {
            index: {
                "step": torch.empty((), dtype=torch.float32),
                "exp_avg": torch.empty(state[n].shape, dtype=torch.bfloat16),
                "exp_avg_sq": torch.empty(state[n].shape, dtype=torch.bfloat16),
            }
            for index, n in enumerate(parameters)
        }
        document = {
            "epoch": 50,
            "global_step": 1363,
            "model_state_dict": state,
            "optimizer_state_dict": {
                "state": moments,
                "param_groups": [
                    {
                        "lr": 5.377e-4,
                        "betas": (0.9, 0.999),
                        "eps": 1e-8,
                        "weight_decay": 0.01,
                        "params": list(range(len(parameters))),
                    }
                ],
            },
            "best_val_loss": 167.15,
            "val_loss": 167.15,
            "config": dict(LAB_CONFIG),
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(document, path)


class SmallNet(nn.Module):
    """A few layers of several kinds, for files that torch itself writes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.layer_norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer_norm(self.norm(self.first(self.embedding(indices)))))


def trained_small_checkpoint(dtype: torch.dtype = torch.float32, steps: int = 2) -> dict[str, Any]:
    """SmallNet and AdamW after `steps` real optimizer steps."""
    torch.manual_seed(0)
    model = SmallNet().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
    return {
        "epoch": steps,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "val_loss": 0.5,
    }


class CodeOnLoad:
    """Pickles into a call of `os.system`. Loading it by Python's own rules leaves `marker` behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Streams that create `marker` if anything of them runs, one for each way a pickle has to call something."""
    command = f"touch '{marker}'"
    argument = _text(command)
    posix = _text("posix") + _text("system") + b"\x93"
    return {
        "reduce_global": b"\x80\x02cposix\nsystem\n" + argument + b"\x85R.",
        "reduce_stack_global": b"\x80\x04" + posix + argument + b"\x85R.",
        "protocol_0": b"cposix\nsystem\n(S" + repr(command).encode() + b"\ntR.",
        "inst": b"(" + argument + b"iposix\nsystem\n.",
        "obj": b"\x80\x02(cposix\nsystem\n" + argument + b"o.",
        "newobj": b"\x80\x02cposix\nsystem\n" + argument + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + posix + argument + b"\x85}\x92.",
        "build": b"\x80\x02cbuiltins\nobject\n)\x81}" + _text("x") + b"cposix\nsystem\n" + argument + b"\x85Rsb.",
        "dotted_name": b"\x80\x04"
        + _text("torch.nn")
        + _text("modules.module.os.system")
        + b"\x93"
        + argument
        + b"\x85R.",
        "eval": b"\x80\x02c__builtin__\neval\n" + _text(f"__import__('os').system({command!r})") + b"\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\n" + _text("system") + b"tR" + argument + b"\x85R.",
        "in_a_key": b"\x80\x02}(cposix\nsystem\n" + argument + b"\x85RK\x01u.",
        "protocol_0_before_an_error": b"cposix\nsystem\n(S" + repr(command).encode() + b"\ntR!!!",
        "before_an_error": b"\x80\x02cposix\nsystem\n" + argument + b"\x85R\xff",
        "partial": b"\x80\x02cfunctools\npartial\n(cposix\nsystem\n" + argument + b"tR)R.",
    }


def torch_zip_of(
    pickle_bytes: bytes,
    storages: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    prefix: str = "archive",
) -> bytes:
    """A zip laid out as torch.save's, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", pickle_bytes)
        archive.writestr(f"{prefix}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{prefix}/data/{key}", data)
        archive.writestr(f"{prefix}/version", b"3\n")
    return buffer.getvalue()


def tensor_pickle(
    key: str = "0",
    numel: int = 4,
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    storage: str = "FloatStorage",
    name: str = "weight",
) -> bytes:
    """The pickle of `{name: tensor}` with every claim about the tensor free to be a lie."""

    def number(value: int) -> bytes:
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    identifier = b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(key) + _text("cpu") + number(numel)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + b"tQ" + number(offset) + numbers(shape)
    tensor += numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + _text(name) + tensor + b"s."


def nested_dicts_pickle(depth: int) -> bytes:
    """`depth` dicts, each the only value of the one around it."""
    return b"\x80\x02" + (b"}" + _text("x")) * depth + b"N" + b"s" * depth + b"."


def shared_lists_pickle(levels: int) -> bytes:
    """A list of two references to a list of two references … : tiny to hold, 2**levels values to print."""
    stream = b"\x80\x02]q\x00"
    for level in range(levels):
        stream += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return stream + b"."


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_NAMES = (
    "../../../etc/passwd",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "\x1b]0;owned\x07\x1b[2J",
    "a\nb\r\tc",
    "\u202egnp.exe",
    "\ud800 lone",
    "",
    "x" * 5000,
    "$(touch /tmp/owned)`id`",
)


def not_checkpoints() -> dict[str, bytes]:
    """Files that somebody may well name by mistake."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("word/document.xml", "<w/>")
    return {
        "empty": b"",
        "text": b"these are my notes\nabout the training\n",
        "text_like_a_pickle": b"ceci n'est pas\nune pipe\n",
        "json": b'{"epoch": 1}',
        "foreign_zip": archive.getvalue(),
        "image": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "zeros": bytes(4096),
        "elf": b"\x7fELF" + bytes(60),
        "one_byte": b"\x80",
        "html": b"<!doctype html><title>404</title>",
    }


def cut_points(size: int, interesting: list[int]) -> Iterator[int]:
    """Lengths to cut a file to: around every interesting offset, and the first and last bytes."""
    wanted = {0, 1, 4, 30, size - 1, size - 22, size // 2}
    for offset in interesting:
        wanted.update((offset - 1, offset, offset + 1))
    yield from sorted(n for n in wanted if 0 <= n < size)


def plain_pickle(value: Any, protocol: int = 2) -> bytes:
    """Python's own pickle of a value."""
    return pickle.dumps(value, protocol=protocol)
