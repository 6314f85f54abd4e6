"""From a format reader's tree to the header: which tensor is what, and where its bytes are."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any, Optional

from remote_payload.checkpoint import dtypes
from remote_payload.checkpoint.header import (
    PARAMETER_ROLES,
    ByteTotals,
    CheckpointHeader,
    GlobalFact,
    OptimizerFacts,
    Role,
    Section,
    TensorEntry,
    TensorPiece,
)
from remote_payload.checkpoint.inert import TensorRef
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.optimizer_facts import describe_optimizers, tensor_identity
from remote_payload.checkpoint.parameter_match import NOT_DERIVABLE, PARTLY
from remote_payload.checkpoint.placement import Placement, Placer
from remote_payload.checkpoint.plain import PlainValues, key_text
from remote_payload.checkpoint.records import RawCheckpoint
from remote_payload.checkpoint.roles import class_counts, model_roles, optimizer_role
from remote_payload.checkpoint.security import unsafe_global_findings
from remote_payload.checkpoint.single_values import SingleValues
from remote_payload.checkpoint.tree import (
    FoundState,
    Path,
    find_average,
    find_optimizers,
    find_state,
    strip_prefixes,
    tensors_below,
)
from remote_payload.wire.chunks import Fingerprint

_CONFIG_KEY = re.compile(
    r"(^|_)(config|configuration|cfg|conf|args|arguments|hparams|hyper_?parameters|options|opt|settings)$",
    re.IGNORECASE,
)
_HISTORY_KEY = re.compile(r"histor", re.IGNORECASE)
_SCHEDULER_KEY = re.compile(r"scheduler", re.IGNORECASE)


def build_header(
    path: str, raw: RawCheckpoint, fingerprint: Fingerprint, values: SingleValues, limits: Limits
) -> CheckpointHeader:
    """Name, classify and place every tensor of `raw`, and sort its plain values."""
    builder = _Builder(raw, values, limits)
    state = find_state(raw.root, limits)
    average = find_average(raw.root, limits)
    if average is not None and state is not None and average.path == state.path:
        average = None
    stored = list(state.entries) if state else []
    stripped, removed = strip_prefixes(stored)
    model = {stripped[k]: t for k, t in state.entries.items()} if state else {}
    roles = model_roles(model)
    for key in stored:
        builder.add(stripped[key], key, Section.MODEL, roles[stripped[key]], model[stripped[key]])
    builder.add_average(average)
    optimizers = find_optimizers(raw.root)
    builder.add_rest(state, average, [path for path, _ in optimizers])
    plain = PlainValues(limits)
    facts = describe_optimizers(optimizers, model, roles, plain, builder.numbers)
    sorted_values = _sort_plain_values(raw, state, average, optimizers, plain, builder.numbers)
    tensors = tuple(builder.entries)
    in_model = tuple(t for t in tensors if t.section is Section.MODEL)
    return CheckpointHeader(
        path=path,
        format=raw.format,
        format_version=raw.format_version,
        byte_order=raw.byte_order,
        size_bytes=sum(f.size for f in raw.files),
        fingerprint=(fingerprint.size, fingerprint.mtime_ns, fingerprint.inode),
        files=raw.files,
        records=raw.records,
        tensors=tensors,
        state_path="/".join(state.path) if state else "",
        state_guessed=state.guessed if state else False,
        removed_prefixes=removed,
        entry_count=len(in_model),
        parameter_count=_parameter_count(model, roles),
        bytes=builder.byte_totals(),
        class_counts=class_counts(in_model),
        dtypes=dict(Counter(t.dtype for t in in_model)),
        optimizer=facts[0] if facts else None,
        other_optimizers=facts[1:],
        scalars=sorted_values.scalars,
        config=sorted_values.config,
        histories=sorted_values.histories,
        scheduler=sorted_values.scheduler,
        plain=sorted_values.plain,
        globals=tuple(GlobalFact(s.full_name[:200], s.trust.value, s.called) for s in raw.symbols[:2000]),
        problems=(*builder.placer.problems(), *unsafe_global_findings(raw.symbols)),
        notes=(*raw.notes, *_notes(state, facts, builder, plain)),
    )


class _Builder:
    """Collects tensor entries under unique names."""

    def __init__(self, raw: RawCheckpoint, values: SingleValues, limits: Limits) -> None:
        self.placer = Placer(raw)
        self.entries: list[TensorEntry] = []
        self.numbers: dict[int, Any] = {}
        self.shared = 0
        self._raw = raw
        self._values = values
        self._limits = limits
        self._names: set[str] = set()
        self._section_of_storage: dict[str, Section] = {}

    def add(self, name: str, key: str, section: Section, role: Role, tensor: TensorRef) -> None:
        name = self._unique(name)
        placement = self.placer.place(name, tensor)
        numel = math.prod(tensor.shape)
        width = dtypes.item_bytes(tensor.dtype)
        if numel == 1 and placement.file_offset is not None and id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = self._values.read(placement.file, placement.file_offset, tensor.dtype)
        self._note_storages(tensor, section)
        self.entries.append(
            TensorEntry(
                name=name,
                key=key,
                section=section,
                role=role,
                dtype=tensor.dtype,
                shape=tensor.shape,
                stride=tensor.stride,
                numel=numel,
                nbytes=None if width is None else numel * width,
                storage_key=tensor.storage.key if tensor.storage else None,
                storage_offset=tensor.offset,
                file=placement.file,
                file_offset=placement.file_offset,
                span_bytes=placement.span_bytes,
                value=self.numbers.get(id(tensor)) if numel == 1 else None,
                unreadable=placement.unreadable,
                pieces=tuple(_piece(*piece) for piece in placement.pieces),
            )
        )

    def _note_storages(self, tensor: TensorRef, section: Section) -> None:
        storages = [t.storage for t in (tensor, *(piece for _, piece in tensor.pieces)) if t.storage is not None]
        self.shared += any(s.key in self._section_of_storage for s in storages)
        for storage in storages:
            self._section_of_storage.setdefault(storage.key, section)

    def add_average(self, average: Optional[FoundState]) -> None:
        if average is None:
            return
        roles = model_roles(average.entries)
        for key, tensor in average.entries.items():
            self.add("/".join((*average.path, key)), key, Section.AVERAGE, roles[key], tensor)

    def add_rest(self, state: Optional[FoundState], average: Optional[FoundState], optimizers: list[Path]) -> None:
        places = list(optimizers)
        if self._raw.optimizer_key is not None:
            places.append((self._raw.optimizer_key,))
        for path, tensor in tensors_below(self._raw.root, self._limits):
            if _belongs(path, state) or _belongs(path, average):
                continue
            in_optimizer = any(path[: len(place)] == place for place in places)
            section = Section.OPTIMIZER if in_optimizer else Section.OTHER
            role = optimizer_role(path[-1]) if in_optimizer else Role.OTHER
            self.add("/".join(path) or "(tensor)", path[-1] if path else "", section, role, tensor)

    def byte_totals(self) -> ByteTotals:
        sums = dict.fromkeys(Section, 0)
        for key, section in self._section_of_storage.items():
            record = self._raw.storages.get(key)
            sums[section] += record.size if record else 0
        return ByteTotals(sums[Section.MODEL], sums[Section.OPTIMIZER], sums[Section.AVERAGE], sums[Section.OTHER])

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}#{number}"
        self._names.add(candidate)
        return candidate


def _piece(offsets: tuple[int, ...], tensor: TensorRef, placement: Placement) -> TensorPiece:
    at = placement.file_offset or 0
    return TensorPiece(offsets, tensor.shape, tensor.stride, placement.file, at, placement.span_bytes)


def _belongs(path: Path, found: Optional[FoundState]) -> bool:
    if found is None or path[: len(found.path)] != found.path:
        return False
    return ".".join(path[len(found.path) :]) in found.entries


def _parameter_count(model: dict[str, TensorRef], roles: dict[str, Role]) -> int:
    distinct = {
        tensor_identity(t): math.prod(t.shape)
        for n, t in model.items()
        if roles[n] in PARAMETER_ROLES and dtypes.is_floating(t.dtype)
    }
    return sum(distinct.values())


@dataclasses.dataclass
class _SortedValues:
    scalars: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    histories: dict[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: Any = None
    plain: dict[str, Any] = dataclasses.field(default_factory=dict)


def _sort_plain_values(
    raw: RawCheckpoint,
    state: Optional[FoundState],
    average: Optional[FoundState],
    optimizers: list[tuple[Path, dict[Any, Any]]],
    plain: PlainValues,
    numbers: dict[int, Any],
) -> _SortedValues:
    values = _SortedValues()
    if raw.metadata:
        values.plain["__metadata__"] = plain.convert(raw.metadata)
    taken = {p[0] for p in ((state and state.path), (average and average.path), *(p for p, _ in optimizers)) if p}
    if not isinstance(raw.root, dict):
        return values
    for key, value in raw.root.items():
        name = key_text(key)
        if isinstance(value, TensorRef):
            if id(value) in numbers and (state is None or state.path):
                values.scalars[name] = numbers[id(value)]
        elif name in taken:
            continue
        elif value is None or isinstance(value, (bool, int, float, str)):
            values.scalars[name] = plain.convert(value)
        else:
            _sort_container(values, name, plain.convert(value))
    return values


def _sort_container(values: _SortedValues, name: str, shown: Any) -> None:
    if _CONFIG_KEY.search(name) and isinstance(shown, dict) and not values.config:
        values.config = shown
    elif _HISTORY_KEY.search(name) or _is_series(shown):
        values.histories[name] = shown
    elif _SCHEDULER_KEY.search(name) and values.scheduler is None:
        values.scheduler = shown
    else:
        values.plain[name] = shown


def _is_series(shown: Any) -> bool:
    """A list of numbers, or of objects that hold numbers: what trainers keep epoch by epoch."""
    if not isinstance(shown, list) or len(shown) < 2:
        return False
    if all(isinstance(v, (int, float)) for v in shown):
        return any(isinstance(v, float) for v in shown)
    return all(isinstance(v, dict) and any(isinstance(n, float) for n in v.values()) for v in shown)


def _notes(
    state: Optional[FoundState],
    optimizers: tuple[OptimizerFacts, ...],
    builder: _Builder,
    plain: PlainValues,
) -> list[str]:
    notes = []
    if state is None:
        notes.append("No mapping of names to tensors was found.")
    elif state.guessed:
        place = "/".join(state.path) or "the file's root"
        notes.append(f"No usual key holds the weights; the largest mapping of names to tensors was taken: {place}.")
    if builder.shared:
        notes.append(f"{builder.shared} tensors share a storage with one before them.")
    if len(optimizers) > 1:
        notes.append(f"There are {len(optimizers)} optimizers; each is matched to the model's parameters by itself.")
    notes.extend(filter(None, (_match_note(o, len(optimizers) > 1) for o in optimizers)))
    unplaced = sum(1 for t in builder.entries if not t.is_readable)
    if unplaced:
        notes.append(f"{unplaced} of {len(builder.entries)} tensors cannot be read.")
    if plain.left_out:
        notes.append("Some plain values were too long, too deep or too many to be repeated here.")
    return notes


def _match_note(optimizer: OptimizerFacts, named: bool) -> str:
    place = f"{optimizer.path}: " if named else ""
    if optimizer.mapping == NOT_DERIVABLE:
        return f"{place}Which parameter each optimizer entry belongs to cannot be derived from order and shapes."
    if optimizer.mapping == PARTLY:
        return (
            f"{place}{len(optimizer.parameters)} of {optimizer.parameter_count} optimizer entries have one place alone "
            "in the model's order; the others are not matched to parameters."
        )
    if optimizer.mapping == "by_name":
        return ""
    shown = optimizer.mapping.replace("_", " ")
    return f"{place}Optimizer entries were matched to parameters {shown}; every shape fits."
