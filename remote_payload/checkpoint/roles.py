"""What each entry of a state dict is for, told from its name, its shape and its neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from remote_payload.checkpoint.dtypes import is_floating
from remote_payload.checkpoint.header import Role, TensorEntry
from remote_payload.checkpoint.inert import TensorRef

_EMBEDDING = re.compile(r"embed|^(wte|wpe)$|pos_emb|tok_emb|token_type|relative_attention_bias|_table$|cls_token", re.I)
_NORM_NAME = re.compile(r"norm|(^|[._])(bn|ln|gn)_?\d*($|[._])|layernorm", re.IGNORECASE)
_SLOPE = re.compile(r"prelu|(^|[._])act", re.IGNORECASE)
_BIAS_LEAF = re.compile(r"(^|_)bias(_|$)|^b_[ih]h")
_WEIGHT_LEAF = re.compile(r"(^|_)weight(_|$)|^kernel$")

_OPTIMIZER_ROLES = {
    "exp_avg": Role.FIRST_MOMENT,
    "momentum_buffer": Role.FIRST_MOMENT,
    "exp_avg_sq": Role.SECOND_MOMENT,
    "max_exp_avg_sq": Role.SECOND_MOMENT,
    "square_avg": Role.SECOND_MOMENT,
    "sum": Role.SECOND_MOMENT,
    "exp_inf": Role.SECOND_MOMENT,
    "exp_avg_sq_row": Role.SECOND_MOMENT,
    "exp_avg_sq_col": Role.SECOND_MOMENT,
    "step": Role.OPTIMIZER_STEP,
}


def model_roles(entries: Mapping[str, TensorRef]) -> dict[str, Role]:
    """The role of every entry of a state dict."""
    return {name: _role(name, tensor, entries) for name, tensor in entries.items()}


def optimizer_role(leaf: str) -> Role:
    """The role of a tensor in an optimizer's state, by the name under which it is kept."""
    return _OPTIMIZER_ROLES.get(leaf, Role.OTHER)


def class_counts(tensors: Iterable[TensorEntry]) -> dict[str, int]:
    """The lab's table: how many layers and entries of each class a state dict has.

    `bias_entries` counts plain biases and norm shifts together, `biases` and `norm_shifts` apart. A BatchNorm layer is
    one with running statistics.
    """
    roles = [t.role for t in tensors]
    count = {role: roles.count(role) for role in Role}
    return {
        "batchnorm_layers": count[Role.RUNNING_VAR],
        "weight_matrices": count[Role.WEIGHT_MATRIX],
        "embeddings": count[Role.EMBEDDING],
        "norm_scales": count[Role.NORM_SCALE],
        "bias_entries": count[Role.BIAS] + count[Role.NORM_SHIFT],
        "biases": count[Role.BIAS],
        "norm_shifts": count[Role.NORM_SHIFT],
        "running_statistics": count[Role.RUNNING_MEAN] + count[Role.RUNNING_VAR],
        "counters": count[Role.COUNTER],
        "other": count[Role.OTHER],
    }


def _role(name: str, tensor: TensorRef, entries: Mapping[str, TensorRef]) -> Role:
    module, _, leaf = name.rpartition(".")
    prefix = f"{module}." if module else ""
    if leaf == "running_mean":
        return Role.RUNNING_MEAN
    if leaf == "running_var":
        return Role.RUNNING_VAR
    if leaf == "num_batches_tracked":
        return Role.COUNTER
    if not is_floating(tensor.dtype):
        return Role.OTHER
    has_statistics = f"{prefix}running_mean" in entries or f"{prefix}running_var" in entries
    dimensions = len(tensor.shape)
    # Of `patch_embed.proj.weight` only the last module counts: it is a projection.
    if dimensions >= 2 and _EMBEDDING.search(module.rpartition(".")[2] if leaf == "weight" else leaf):
        return Role.EMBEDDING
    if leaf == "weight" and dimensions == 1:
        return Role.OTHER if _SLOPE.search(module) and not has_statistics else Role.NORM_SCALE
    if leaf == "bias" and dimensions == 1:
        weight = entries.get(f"{prefix}weight")
        is_norm = has_statistics or (weight is not None and len(weight.shape) == 1)
        return Role.NORM_SHIFT if is_norm and not _SLOPE.search(module) else Role.BIAS
    if leaf in ("gamma", "beta") and dimensions == 1 and _NORM_NAME.search(module):
        return Role.NORM_SCALE if leaf == "gamma" else Role.NORM_SHIFT
    if _BIAS_LEAF.search(leaf) and dimensions <= 1:
        return Role.BIAS
    if dimensions >= 2 and leaf != "weight_g" and _WEIGHT_LEAF.search(leaf):
        return Role.WEIGHT_MATRIX
    return Role.OTHER
