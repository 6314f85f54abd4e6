"""`pytorch_model.bin.index.json`: a state dict that torch.save wrote in several files."""

from __future__ import annotations

import os

from remote_payload.checkpoint.errors import MalformedCheckpointError
from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.parts import Parts
from remote_payload.checkpoint.records import RawCheckpoint
from remote_payload.checkpoint.safetensors import compare_with_index, read_weight_map

TORCH_INDEX_SUFFIX = ".bin.index.json"


def read_torch_index(path: str, limits: Limits) -> RawCheckpoint:
    """A sharded checkpoint from its index file. Raises `CheckpointError`; shards lie beside the index."""
    weight_map = read_weight_map(path, limits)
    tree: dict[str, object] = {}
    repeated = []
    with Parts(os.path.dirname(path) or ".", "torch_sharded", limits) as parts:
        for name in sorted(set(weight_map.values())):
            shard = parts.read(name)
            if not isinstance(shard, dict):
                raise MalformedCheckpointError(f"the shard {name!r} holds no state dict")
            for key, value in shard.items():
                if isinstance(key, str) and isinstance(value, TensorRef):
                    if key in tree:
                        repeated.append(key)
                    tree.setdefault(key, value)
        raw = parts.finish({name: tree[name] for name in weight_map if name in tree})
    compare_with_index(raw, tree, weight_map)
    if repeated:
        raw.notes.append(f"{len(repeated)} tensors are in more than one shard; the first of each is read.")
    return raw
