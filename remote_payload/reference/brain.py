"""A real brain's voxels: the MNI152 tissue maps that nilearn carries, read as files and thinned to a voxel count."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remote_payload.reference.film import DemonstrationDataError, SourceFile, describe_source, packaged_file

BRAIN_DISTRIBUTION = "nilearn"
_TISSUE_FILES = (
    "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
    "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
)
_TISSUE_THRESHOLD = 0.3
_HEADER_BYTES = 348
_LARGEST_VOLUME = 512**3
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 512: "u2"}


@dataclasses.dataclass(frozen=True)
class VoxelGrid:
    """Brain voxels on a coarse grid: `indices` `(V, 3)` into `shape`; axis 0 left to right, 1 back to front, 2 up.

    `spacing` is the side of a grid cell in voxels of the template (1 mm).
    """

    shape: tuple[int, int, int]
    indices: NDArray[np.int16]
    spacing: float
    sources: tuple[SourceFile, ...]


def read_nifti(path: Path) -> NDArray[np.float32]:
    """The volume of a gzipped single-file NIfTI-1, scaled. Raises `DemonstrationDataError` if it is none."""
    with gzip.open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or header[344:347] != b"n+1":
            raise DemonstrationDataError(f"{path.name} is not a NIfTI-1 file")
        order = "<" if struct.unpack("<i", header[:4])[0] == _HEADER_BYTES else ">"
        dims = struct.unpack(order + "8h", header[40:56])
        (code,) = struct.unpack(order + "h", header[70:72])
        offset, slope, intercept = struct.unpack(order + "3f", header[108:120])
        shape = dims[1:4]
        if code not in _DTYPES or min(shape) < 1 or int(np.prod(shape, dtype=np.int64)) > _LARGEST_VOLUME:
            raise DemonstrationDataError(f"{path.name}: data type {code} or shape {shape} is none that is read here")
        dtype = np.dtype(order + _DTYPES[code])
        file.seek(int(offset))
        data = file.read(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    volume = np.frombuffer(data, dtype=dtype).reshape(shape, order="F").astype(np.float32)
    return volume * np.float32(slope) + np.float32(intercept) if slope else volume


def brain_grid(voxels: int) -> VoxelGrid:
    """The coarsest grid that has at least `voxels` cells half full of grey or white matter; the fullest are kept."""
    paths = [packaged_file(BRAIN_DISTRIBUTION, name) for name in _TISSUE_FILES]
    tissue = sum((_unit_scaled(read_nifti(p)) for p in paths), start=np.float32(0.0))
    sources = tuple(describe_source(BRAIN_DISTRIBUTION, p) for p in paths)
    total = _integral(np.asarray(tissue) > _TISSUE_THRESHOLD)
    finest, coarsest = 1.0, 60.0
    for _ in range(24):
        middle = (finest + coarsest) / 2
        if int((_cell_fill(total, middle) >= 0.5).sum()) >= voxels:
            finest = middle
        else:
            coarsest = middle
    fill = _cell_fill(total, finest)
    order = np.argsort(-fill, axis=None, kind="stable")[:voxels]
    if len(order) < voxels or fill.flat[order[-1]] <= 0:
        raise DemonstrationDataError(f"the template has fewer than {voxels} brain voxels")
    indices = np.stack(np.unravel_index(np.sort(order), fill.shape), axis=1).astype(np.int16)
    shape = (int(fill.shape[0]), int(fill.shape[1]), int(fill.shape[2]))
    return VoxelGrid(shape, indices, finest, sources)


def _unit_scaled(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    return volume / max(float(volume.max()), 1e-6)


def _integral(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    padded = np.pad(mask, ((1, 0), (1, 0), (1, 0)))
    total: NDArray[np.int64] = padded.cumsum(0, dtype=np.int64).cumsum(1).cumsum(2)
    return total


def _cell_fill(total: NDArray[np.int64], spacing: float) -> NDArray[np.float64]:
    """Share of brain in each cell of a grid of cubes with that side, from the integral volume."""
    edges = [np.floor(np.arange(0, n, spacing)).astype(np.int64) for n in total.shape]
    corners = total[np.ix_(*edges)]
    inside = np.diff(np.diff(np.diff(corners, axis=0), axis=1), axis=2)
    sides = [np.diff(e) for e in edges]
    volume = sides[0][:, None, None] * sides[1][None, :, None] * sides[2][None, None, :]
    return np.asarray(inside / volume)
