"""Which of a model's parameters each entry of an optimizer is, told by order and shapes alone. Pure.

torch numbers parameters in the order of its groups and keeps no names. What is believed are a few habits, and only
where every shape fits and nothing else would fit as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Optional

Shape = tuple[int, ...]
NOT_DERIVABLE = "not_derivable"
PARTLY = "partly_by_order"

_USUAL_BUFFER = re.compile(r"(^|\.)(masked_bias|(\w+_)?inv_freq|attn_mask|rel_pos_indices|window_|n_)$")
"""Buffers of floating point that libraries keep among the weights."""
_ADAPTER = re.compile(r"(^|\.)lora_")
_MOST_PARTS = 100
_DEEPEST_SUBTREE = 8
_MOST_WORK = 5_000_000
_MOST_PERMUTED = 4


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter as an optimizer knows it: its number, and its shape if its state has one."""

    index: str
    shape: Optional[Shape]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What may be trained of a state dict. Names of the same elements have one identity."""

    name: str
    shape: Shape
    identity: Hashable


@dataclasses.dataclass(frozen=True)
class Match:
    """Names by an optimizer's indices, and how they were found: see `OptimizerFacts.mapping`."""

    names: dict[str, str]
    mapping: str


Groups = Sequence[Sequence[Entry]]
_NONE = Match({}, NOT_DERIVABLE)


def match_optimizers(optimizers: Sequence[Groups], parameters: Sequence[Parameter]) -> list[Match]:
    """A match for every optimizer of a file, each given as its groups. No parameter is believed to be in two."""
    found = [_match(groups, parameters) for groups in optimizers]
    claims = Counter(name for match in found for name in match.names.values())
    kept = [_NONE if any(claims[n] > 1 for n in m.names.values()) else m for m in found]
    if len(found) > 1 and any(m.mapping in (NOT_DERIVABLE, PARTLY) for m in kept):
        return _side_by_side(optimizers, _distinct(parameters)) or kept
    return kept


def _match(groups: Groups, parameters: Sequence[Parameter]) -> Match:
    entries = [e for group in groups for e in group]
    if not entries:
        return _NONE
    distinct = _distinct(parameters)
    shapes = {e.shape for e in entries}
    trained = [p for p in distinct if not _USUAL_BUFFER.search(p.name) and (p.shape in shapes or None in shapes)]
    for candidates in (parameters, distinct, trained, [p for p in trained if _ADAPTER.search(p.name)]):
        found = _one_to_one(entries, candidates)
        if found is not None:
            return found
    by_groups = _in_groups(groups, trained)
    if len(by_groups) == len(entries):
        return Match(by_groups, "by_order_in_groups")
    if len(groups) > 1 and None not in shapes:
        # A group for each layer and kind, as where deeper layers get smaller rates.
        kinds = [[e for e in entries if (len(e.shape or ()) >= 2) is matrix] for matrix in (True, False)]
        by_kinds = _in_groups(kinds, trained)
        if len(by_kinds) == len(entries):
            return Match(by_kinds, "by_order_of_kinds")
    in_parts = _subtree(entries, trained) or _in_parts(entries, trained)
    if in_parts is not None:
        return Match(_named(entries, in_parts), "by_order_of_parts")
    return Match(by_groups, PARTLY) if by_groups else _NONE


def _distinct(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Tied weights are one parameter to an optimizer, however many names they have: the first is kept."""
    found: dict[Hashable, Parameter] = {}
    for parameter in parameters:
        found.setdefault(parameter.identity, parameter)
    return list(found.values())


def _fits(entry: Entry, parameter: Parameter) -> bool:
    return entry.shape is None or entry.shape == parameter.shape


def _all_fit(entries: Sequence[Entry], parameters: Sequence[Parameter]) -> bool:
    return len(entries) == len(parameters) and all(map(_fits, entries, parameters))


def _named(entries: Sequence[Entry], parameters: Sequence[Parameter]) -> dict[str, str]:
    return {e.index: p.name for e, p in zip(entries, parameters)}


def _one_to_one(entries: list[Entry], candidates: Sequence[Parameter]) -> Optional[Match]:
    """Every candidate is an entry: in the model's order, or matrices and vectors apart each in that order."""
    if len(candidates) != len(entries):
        return None
    matrices = [p for p in candidates if len(p.shape) >= 2]
    vectors = [p for p in candidates if len(p.shape) < 2]
    for order, mapping in (
        (candidates, "by_order"),
        (matrices + vectors, "by_order_matrices_first"),
        (vectors + matrices, "by_order_vectors_first"),
    ):
        if _all_fit(entries, order):
            return Match(_named(entries, order), mapping)
    return None


def _in_groups(groups: Groups, candidates: Sequence[Parameter]) -> dict[str, str]:
    """The entries that have one place alone where each group takes its parameters in the model's order.

    So where decay and no decay make two groups, whatever decides between them; where buffers stand among the weights;
    and where parts of the model are frozen and left out, as far as the others do not look like them.
    """
    if len(groups) * len(candidates) > _MOST_WORK:
        return {}
    certain: dict[int, dict[int, int]] = {number: {} for number in range(len(groups))}
    progress = True
    while progress:
        progress = False
        for number, group in enumerate(groups):
            others = {place for other, found in certain.items() if other != number for place in found.values()}
            places = _only_places(group, candidates, others)
            if places is None:
                return {}
            if len(places) > len(certain[number]):
                certain[number] = places
                # What a group surely has is none of the others'.
                progress = len(groups) > 1
    found = [(groups[n][i].index, p) for n, places in certain.items() for i, p in places.items()]
    if len({p for _, p in found}) < len(found):
        return {}
    return {index: candidates[place].name for index, place in found}


def _only_places(group: Sequence[Entry], candidates: Sequence[Parameter], taken: set[int]) -> Optional[dict[int, int]]:
    """Positions in the group whose first and last possible place among the candidates are the same; None if it has no
    place at all.
    """
    free = [place for place in range(len(candidates)) if place not in taken]
    first = _earliest(group, candidates, free)
    last = _earliest(group[::-1], candidates, free[::-1])
    if first is None or last is None:
        return None
    return {i: a for i, (a, b) in enumerate(zip(first, reversed(last))) if a == b}


def _earliest(group: Sequence[Entry], candidates: Sequence[Parameter], order: Sequence[int]) -> Optional[list[int]]:
    remaining = iter(order)
    places = [next((p for p in remaining if _fits(entry, candidates[p])), None) for entry in group]
    known = [p for p in places if p is not None]
    return known if len(known) == len(places) else None


def _subtree(entries: Sequence[Entry], candidates: Sequence[Parameter]) -> Optional[Sequence[Parameter]]:
    """The one module all of whose parameters these are."""
    modules: dict[str, list[Parameter]] = {}
    for parameter in candidates:
        parts = parameter.name.split(".")
        for depth in range(1, min(len(parts), _DEEPEST_SUBTREE + 1)):
            modules.setdefault(".".join(parts[:depth]), []).append(parameter)
    fitting = {tuple(p.name for p in m): m for m in modules.values() if _all_fit(entries, m)}
    return next(iter(fitting.values())) if len(fitting) == 1 else None


def _in_parts(entries: Sequence[Entry], candidates: Sequence[Parameter]) -> Optional[list[Parameter]]:
    """Whole top-level parts of the model in some order, where it is clear which part comes next."""
    if any(e.shape is None for e in entries):
        return None
    parts: dict[str, list[Parameter]] = {}
    for parameter in candidates:
        parts.setdefault(parameter.name.partition(".")[0], []).append(parameter)
    if len(parts) > _MOST_PARTS:
        return None
    found: list[Parameter] = []
    while len(found) < len(entries):
        at = len(found)
        fitting = [n for n, part in parts.items() if _all_fit(entries[at : at + len(part)], part)]
        if len(fitting) != 1:
            return None
        found.extend(parts.pop(fitting[0]))
    return found


def _side_by_side(optimizers: Sequence[Groups], candidates: Sequence[Parameter]) -> Optional[list[Match]]:
    """Optimizers that have the whole model between them, one behind the other in the one order that fits."""
    if not 2 <= len(optimizers) <= _MOST_PERMUTED:
        return None
    flat = [[e for group in groups for e in group] for groups in optimizers]
    if sum(map(len, flat)) != len(candidates) or any(e.shape is None for entries in flat for e in entries):
        return None
    fitting = [
        order
        for order in itertools.permutations(range(len(flat)))
        if _all_fit([e for number in order for e in flat[number]], candidates)
    ]
    if len(fitting) != 1:
        return None
    matches: dict[int, Match] = {}
    at = 0
    for number in fitting[0]:
        matches[number] = Match(_named(flat[number], candidates[at:]), "by_order")
        at += len(flat[number])
    return [matches[number] for number in range(len(flat))]
