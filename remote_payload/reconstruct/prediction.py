"""What the model gave for one batch, in memory and on the disk: how results cross processes and outlive them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from remote_payload.reconstruct.protocol import Sample

Array = NDArray[Any]

_MAGIC = b"remote-eval batch 1\n"
_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_NUMBERS = "fiub"


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The model's outputs for the samples at `positions`, with what they are compared with.

    `samples` have their targets and no inputs. `predicted` has `(N, …)` for each modality, `latents` those of targets
    and predictions; `dtypes` are the predictions' element types as the adapter gave them.
    """

    positions: tuple[int, ...]
    samples: tuple[Sample, ...]
    predicted: dict[str, Array]
    latents: dict[str, tuple[Array, Array]]
    dtypes: dict[str, str]


class PredictionStore:
    """Results of batches in a folder, under a key that says of what: a later attempt goes on from them.

    Nothing is synced to the disk: what a crash of the machine tore is seen by its digest, and computed again.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def key(self) -> str:
        return self._key

    def adopt(self, earlier: Sequence[Path]) -> None:
        """Take over what earlier attempts left. Whether it is of this key is looked at when it is read."""
        for folder in earlier:
            for path in sorted(folder.glob("batch-*")) if folder.is_dir() else ():
                target = self._folder / path.name
                if not target.exists() and path.is_file() and not path.is_symlink():
                    with contextlib.suppress(OSError):
                        os.rename(path, target)

    def read(self, positions: Sequence[int]) -> Optional[BatchResult]:
        """The result of the batch of these positions, if a whole one of this key is there."""
        try:
            data = self._path(positions).read_bytes()
        except OSError:
            return None
        return _decode(data, self._key, positions)

    def write(self, result: BatchResult) -> None:
        """Put it in place at once as a whole. Raises `OSError`."""
        path = self._path(result.positions)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                digest = hashlib.sha256()
                for part in _encode(result, self._key):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _path(self, positions: Sequence[int]) -> Path:
        """By first position and length: batches of another size never take each other's place."""
        return self._folder / f"batch-{positions[0]:08d}-{len(positions)}"


def as_array(value: Any) -> NDArray[Any]:
    """A tensor or array on the host; 16-bit floats as float32, which NumPy has no other name for."""
    if isinstance(value, torch.Tensor):
        detached = value.detach()
        if detached.dtype in (torch.bfloat16, torch.float16):
            detached = detached.float()
        host: NDArray[Any] = detached.cpu().numpy()
        return host
    return np.asarray(value)


def without_inputs(sample: Sample, modalities: Sequence[str]) -> Sample:
    """What metrics need of a sample: its names, and the targets of these modalities as arrays."""
    targets = {name: as_array(sample.targets[name]) for name in modalities if name in sample.targets}
    named = {f.name: str(getattr(sample, f.name)) for f in dataclasses.fields(Sample) if f.name not in _DATA_FIELDS}
    return Sample(inputs={}, targets=targets, **named)


_DATA_FIELDS = ("inputs", "targets")


def _encode(result: BatchResult, key: str) -> Iterator[bytes]:
    arrays: list[Array] = []
    places: list[dict[str, Any]] = []

    def place(**where: Any) -> None:
        array = np.ascontiguousarray(where.pop("array"))
        places.append({**where, "dtype": array.dtype.str, "shape": list(array.shape)})
        arrays.append(array)

    for name, array in result.predicted.items():
        place(part="predicted", name=name, array=array)
    for name, pair in result.latents.items():
        for side in (0, 1):
            place(part="latents", name=name, side=side, array=pair[side])
    for number, sample in enumerate(result.samples):
        for name, array in sample.targets.items():
            place(part="targets", name=name, sample=number, array=array)
    header = {
        "key": key,
        "positions": list(result.positions),
        "samples": [_names_of(sample) for sample in result.samples],
        "dtypes": result.dtypes,
        "arrays": places,
    }
    text = json.dumps(header).encode()
    yield _MAGIC + len(text).to_bytes(_LENGTH_BYTES, "big") + text
    for array in arrays:
        yield array.tobytes()


def _names_of(sample: Sample) -> dict[str, str]:
    return {f.name: str(getattr(sample, f.name)) for f in dataclasses.fields(sample) if f.name not in _DATA_FIELDS}


def _decode(data: bytes, key: str, positions: Sequence[int]) -> Optional[BatchResult]:
    """None for whatever is not whole, or not of this key and these positions."""
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not body.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        return None
    start = len(_MAGIC) + _LENGTH_BYTES
    end = start + int.from_bytes(body[len(_MAGIC) : start], "big")
    header = json.loads(body[start:end])
    if header["key"] != key or header["positions"] != list(positions):
        return None
    predicted: dict[str, Array] = {}
    latents: dict[str, list[Array]] = {}
    targets: list[dict[str, Array]] = [{} for _ in header["samples"]]
    for place, array in _arrays(body, end, header["arrays"]):
        name = place["name"]
        if place["part"] == "predicted":
            predicted[name] = array
        elif place["part"] == "latents":
            latents.setdefault(name, []).append(array)
        else:
            targets[place["sample"]][name] = array
    return BatchResult(
        tuple(header["positions"]),
        tuple(Sample(inputs={}, targets=t, **names) for t, names in zip(targets, header["samples"])),
        predicted,
        {name: (pair[0], pair[1]) for name, pair in latents.items()},
        header["dtypes"],
    )


def _arrays(body: bytes, at: int, places: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Array]]:
    for place in places:
        dtype = np.dtype(place["dtype"])
        if dtype.kind not in _NUMBERS:
            raise ValueError(f"an array of {place['dtype']} is none of numbers")
        count = int(np.prod(place["shape"], dtype=np.int64))
        yield place, np.frombuffer(body, dtype, count, at).reshape(place["shape"])
        at += count * dtype.itemsize
