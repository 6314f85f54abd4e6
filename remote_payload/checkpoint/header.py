"""What a checkpoint says about itself without a single tensor being read."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any, Optional

from remote_payload.checkpoint.parameter_match import NOT_DERIVABLE, PARTLY
from remote_payload.checkpoint.placement import is_dense
from remote_payload.checkpoint.records import DataFile, Record
from remote_payload.wire.codec import to_json
from remote_payload.wire.results import Finding

HEADER_SCHEMA_VERSION = 1


class Role(str, enum.Enum):
    """What a tensor is for, which decides what is normal for it."""

    WEIGHT_MATRIX = "weight_matrix"
    EMBEDDING = "embedding"
    BIAS = "bias"
    NORM_SCALE = "norm_scale"
    NORM_SHIFT = "norm_shift"
    RUNNING_MEAN = "running_mean"
    RUNNING_VAR = "running_var"
    COUNTER = "counter"
    FIRST_MOMENT = "first_moment"
    SECOND_MOMENT = "second_moment"
    OPTIMIZER_STEP = "optimizer_step"
    OTHER = "other"


PARAMETER_ROLES = frozenset(
    {Role.WEIGHT_MATRIX, Role.EMBEDDING, Role.BIAS, Role.NORM_SCALE, Role.NORM_SHIFT, Role.OTHER}
)


class Section(str, enum.Enum):
    """Which part of the checkpoint a tensor belongs to."""

    MODEL = "model"
    OPTIMIZER = "optimizer"
    AVERAGE = "average"
    """A second copy of the weights: an exponential moving average."""
    OTHER = "other"


@dataclasses.dataclass(frozen=True)
class TensorPiece:
    """A box of a tensor with a place of its own: elements from `offsets` on, `shape` of them, in `stride` order."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: int
    file_offset: int
    span_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor. `name` is unique in the header and what the functions that read tensors take.

    For the model it is the state dict's key without wrappers' prefixes; elsewhere the path through the file, joined by
    slashes. `key` is the state dict's key as stored. `file_offset` is that of the tensor's first element, None if its
    bytes are not there. Strides and `storage_offset` are in elements. `value` is given for single numbers.
    """

    name: str
    key: str
    section: Section
    role: Role
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    numel: int
    nbytes: Optional[int]
    storage_key: Optional[str]
    storage_offset: int
    file: int = 0
    file_offset: Optional[int] = None
    span_bytes: int = 0
    """From the first element to behind the last, in the file: `nbytes` if the tensor is dense."""
    value: Any = None
    unreadable: Optional[str] = None
    """Why there is no `file_offset`."""
    pieces: tuple[TensorPiece, ...] = ()
    """Where a sharded tensor lies: boxes that cover it exactly, in row-major order of their offsets. Such a tensor has
    no `file_offset` of its own; the usual tensor is in one place and has no pieces."""

    @property
    def is_readable(self) -> bool:
        """Its bytes are there, in one place or in pieces."""
        return self.file_offset is not None or bool(self.pieces)

    @property
    def is_dense(self) -> bool:
        """Its elements fill their span exactly, in whatever order of dimensions."""
        return is_dense(self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class OptimizerFacts:
    """An optimizer's state. `parameters` maps its indices to the model's names, as far as they can be derived.

    `mapping` says how they were: by_name; by_order, by_order_matrices_first, by_order_vectors_first, by_order_of_kinds
    (all of the model that has such shapes); by_order_in_groups (each group in the model's order, some left out);
    by_order_of_parts (whole parts of the model); partly_by_order (only those that have one place alone); not_derivable.
    `groups` are the parameter groups without their parameter lists. `steps` are the distinct step counts.
    """

    kind: str
    path: str
    state_count: int
    parameter_count: int
    parameters: dict[str, str]
    mapping: str
    groups: tuple[dict[str, Any], ...]
    steps: tuple[Any, ...]
    without_state: tuple[str, ...] = ()
    parameter_groups: dict[str, int] = dataclasses.field(default_factory=dict)
    """The group (its place in `groups`) of each index; empty if there is only one."""

    @property
    def is_matched(self) -> bool:
        """Every entry is known by its parameter's name."""
        return self.mapping not in (PARTLY, NOT_DERIVABLE)


@dataclasses.dataclass(frozen=True)
class GlobalFact:
    """A global that the pickle names; `trust` is known, inert or unsafe."""

    name: str
    trust: str
    called: bool


@dataclasses.dataclass(frozen=True)
class RecordSummary:
    """The records that tensors and pickles lie in, and how many carry a checksum."""

    count: int
    bytes: int
    with_checksum: int
    unreadable: int


@dataclasses.dataclass(frozen=True)
class ByteTotals:
    """Bytes of the tensors by section; a storage that several tensors share counts once, where it first appears."""

    model: int
    optimizer: int
    average: int
    other: int


@dataclasses.dataclass(frozen=True)
class CheckpointHeader:
    """All facts of a checkpoint's header.

    `entry_count` counts the state dict's entries, `parameter_count` the elements of its distinct trainable ones (no
    running statistics, counters or integer tables). `state_path` is where the state dict was found; `state_guessed`
    says that its place was not one of the usual. `plain` holds the remaining values that are no tensors.
    """

    path: str
    format: str
    format_version: Optional[str]
    byte_order: str
    size_bytes: int
    fingerprint: tuple[int, ...]
    files: tuple[DataFile, ...]
    records: tuple[Record, ...]
    tensors: tuple[TensorEntry, ...]
    state_path: str
    state_guessed: bool
    removed_prefixes: tuple[str, ...]
    entry_count: int
    parameter_count: int
    bytes: ByteTotals
    class_counts: dict[str, int]
    dtypes: dict[str, int]
    optimizer: Optional[OptimizerFacts]
    other_optimizers: tuple[OptimizerFacts, ...]
    scalars: dict[str, Any]
    config: dict[str, Any]
    histories: dict[str, Any]
    scheduler: Any
    plain: dict[str, Any]
    globals: tuple[GlobalFact, ...]
    problems: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def optimizers(self) -> tuple[OptimizerFacts, ...]:
        """`optimizer` and the others that the file holds."""
        return () if self.optimizer is None else (self.optimizer, *self.other_optimizers)

    def model_tensors(self) -> tuple[TensorEntry, ...]:
        """The state dict's entries in its order."""
        return tuple(t for t in self.tensors if t.section is Section.MODEL)

    def tensor(self, name: str) -> TensorEntry:
        """The tensor of that name. Raises `KeyError`."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, TensorEntry]:
        return {t.name: t for t in self.tensors}

    def record_summary(self) -> RecordSummary:
        return RecordSummary(
            len(self.records),
            sum(r.size for r in self.records),
            sum(1 for r in self.records if r.crc32 is not None and r.readable),
            sum(1 for r in self.records if not r.readable),
        )

    def to_json(self) -> dict[str, Any]:
        """The header as a JSON value; records are summed up, since tensors repeat what matters of them."""
        document: dict[str, Any] = {"schema_version": HEADER_SCHEMA_VERSION}
        for field in dataclasses.fields(self):
            if field.name != "records":
                document[field.name] = to_json(getattr(self, field.name))
        document["records"] = to_json(self.record_summary())
        return document
