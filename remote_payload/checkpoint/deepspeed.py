"""DeepSpeed's folders: model states in one file for each slice of the model, the optimizer in partitions beside it."""

from __future__ import annotations

import os
import re
from typing import Any, Optional, Union

from remote_payload.checkpoint.deepspeed_parameters import MASTER, Assembled, assemble
from remote_payload.checkpoint.errors import CheckpointError, MalformedCheckpointError, TruncatedCheckpointError
from remote_payload.checkpoint.inert import Opaque
from remote_payload.checkpoint.limits import Limits
from remote_payload.checkpoint.parts import Parts, path_inside, reason
from remote_payload.checkpoint.records import Folder, RawCheckpoint, integrity_problem
from remote_payload.checkpoint.source import Source

_LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt\Z")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt\Z")
_MAX_TAG_BYTES = 256
OPTIMIZER_KEY = "optimizer_partitions"


class DeepSpeedReader:
    """Reads the weights as they are served, and the optimizer's partitions put together by parameter where they fit.

    Of ZeRO 3, whose served weights lie in no file, the float32 weights of the partitions are the model.
    """

    def recognises(self, folder: Folder) -> bool:
        if any(_MODEL.match(name) for name in folder.names):
            return True
        tag = _latest_tag(folder.path) if _LATEST in folder.names else None
        return tag is not None and any(_MODEL.match(n) for n in _listing(os.path.join(folder.path, tag)))

    def read(self, folder: Folder, limits: Limits) -> RawCheckpoint:
        path, names = folder.path, folder.names
        notes = []
        if not any(_MODEL.match(n) for n in names):
            tag = _latest_tag(path)
            if tag is None:
                raise TruncatedCheckpointError(f"{path} holds no model states")
            path = path_inside(path, tag, links_may_leave=False)
            names = _listing(path)
            notes.append(f"The file {_LATEST!r} names {tag!r}; other steps in the folder are not looked at.")
        with Parts(path, "deepspeed", limits) as parts:
            parts.raw.notes.extend(notes)
            parts.raw.optimizer_key = OPTIMIZER_KEY
            models = sorted((_ranks(m), m.group()) for m in map(_MODEL.match, names) if m)
            root = parts.read(models[0][1])
            if not isinstance(root, dict):
                raise MalformedCheckpointError(f"{models[0][1]} holds no model states")
            partitions = sorted((_ranks(m), m.group()) for m in map(_OPTIMIZER.match, names) if m)
            shards = _read_partitions(parts, [name for _, name in partitions])
            _check_count(parts.raw, shards)
            stage = next((s for s in (_field(p, "zero_stage") for p in shards.values()) if type(s) is int), None)
            slices = len({model_rank for (model_rank, _), _ in models})
            if slices > 1:
                parts.raw.notes.append(
                    f"The model is cut into {slices} tensor-parallel slices; only the first is read, none are joined."
                )
            frozen = root.get("frozen_param_fragments")
            if isinstance(frozen, dict) and frozen:
                parts.raw.notes.append("Fragments of frozen parameters are listed as they are and not joined.")
            if not shards:
                return parts.finish(root)
            assembled: Union[Assembled, str] = "a partition is missing or of unknown stage"
            if stage is not None and not parts.raw.problems:
                own = [shards[n] for (model_rank, _), n in partitions if model_rank == models[0][0][0]]
                assembled = assemble(root, own, stage)
            if isinstance(assembled, str):
                parts.raw.notes.append(_not_assembled(stage, assembled))
                return parts.finish({**root, OPTIMIZER_KEY: shards})
            return parts.finish(_with_parameters(root, assembled, stage, parts.raw))


def _read_partitions(parts: Parts, names: list[str]) -> dict[str, object]:
    shards: dict[str, object] = {}
    lost: dict[str, str] = {}
    for name in names:
        try:
            shards[name] = parts.read(name)
        except CheckpointError as error:
            lost[name] = reason(error)
    if lost:
        parts.raw.problems.append(
            integrity_problem(
                "integrity.shard_incomplete",
                f"{len(lost)} of {len(names)} partitions of the optimizer cannot be read",
                tuple(lost),
                {"reasons": dict(list(lost.items())[:10])},
                "Training cannot be resumed from a checkpoint that lacks a part of its optimizer.",
            )
        )
    return shards


def _check_count(raw: RawCheckpoint, shards: dict[str, object]) -> None:
    counts = {_field(s, "partition_count") for s in shards.values()}
    stated = next((_largest(c) for c in counts if _largest(c) is not None), None)
    if stated is not None and stated > len(shards) and not raw.problems:
        raw.problems.append(
            integrity_problem(
                "integrity.shard_incomplete",
                f"{len(shards)} of {stated} partitions of the optimizer are there",
                (),
                {"partitions": len(shards), "stated": stated},
                "Each partition says how many there are; some were not copied or not saved.",
            )
        )


def _with_parameters(
    root: dict[Any, Any], assembled: Assembled, stage: Optional[int], raw: RawCheckpoint
) -> dict[Any, Any]:
    raw.optimizer_key = "optimizer"
    made = {**root, "optimizer": assembled.optimizer}
    if stage != 3:
        raw.notes.append(
            f"ZeRO stage {stage}: float32 weights and moments were put together from the partitions, by parameter."
        )
        return made
    weights = root.get("module")
    named = dict(weights) if isinstance(weights, dict) else {}
    named.update(assembled.masters)
    shared = root.get("shared_params")
    for alias, name in shared.items() if isinstance(shared, dict) else ():
        if isinstance(alias, str) and isinstance(name, str) and name in assembled.masters:
            named[alias] = assembled.masters[name]
    for entry in assembled.optimizer["state"].values():
        # Here they are the model's own.
        del entry[MASTER]
    raw.notes.append("ZeRO stage 3: the model is the float32 weights, put together from the partitions of all ranks.")
    return {**made, "module": named}


def _not_assembled(stage: Optional[int], why: str) -> str:
    shown = "of unknown stage" if stage is None else f"stage {stage}"
    told = " The model states hold placeholders; DeepSpeed's own zero_to_fp32.py writes the weights to one file."
    return (
        f"ZeRO {shown}: the optimizer's moments and 32-bit weights are read as flat partitions and "
        f"not matched to parameters: {why}." + (told if stage == 3 else "")
    )


def _field(partition: object, name: str) -> Any:
    state = partition.get("optimizer_state_dict") if isinstance(partition, dict) else None
    value = state.get(name) if isinstance(state, dict) else None
    return tuple(value) if isinstance(value, list) and all(type(v) is int for v in value) else _plain(value)


def _plain(value: object) -> Optional[int]:
    if isinstance(value, Opaque) and isinstance(value.arguments, tuple) and len(value.arguments) == 1:
        # DeepSpeed's stage is a member of an enumeration.
        value = value.arguments[0]
    return value if type(value) is int else None


def _largest(count: Any) -> Optional[int]:
    if isinstance(count, tuple):
        return max(count, default=None)
    return _plain(count)


def _ranks(match: re.Match[str]) -> tuple[int, int]:
    """Model-parallel rank first: the slices of rank 0 are read."""
    return int(match.group(2)), int(match.group(1) or 0)


def _latest_tag(folder: str) -> Optional[str]:
    """The sub-folder that the file `latest` names, None if it names none here."""
    try:
        with Source(os.path.join(folder, _LATEST)) as source:
            tag = source.read(0, min(source.size, _MAX_TAG_BYTES)).decode("utf-8", "replace").strip()
        path = path_inside(folder, tag, links_may_leave=False)
    except (CheckpointError, ValueError):
        return None
    return tag if "/" not in tag and os.path.isdir(path) else None


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
