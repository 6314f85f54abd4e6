"""The pickle machine against Python's own, on values that need no code."""

from __future__ import annotations

import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_payload.checkpoint.errors import CheckpointError
from remote_payload.checkpoint.inert import Opaque
from remote_payload.checkpoint.limits import DEFAULT_LIMITS, Limits
from remote_payload.checkpoint.unpickle import unpickle

KEYS = st.one_of(st.text(), st.integers(-(2**59), 2**59), st.booleans(), st.none(), st.binary(max_size=8), st.floats())
LEAVES = st.one_of(
    KEYS.filter(lambda v: v == v), st.integers(-(2**900), 2**900), st.text(max_size=400), st.binary(max_size=400)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS.filter(lambda v: v == v), inner, max_size=5),
        st.frozensets(st.text(), max_size=4),
        st.sets(st.integers(-(2**59), 2**59), max_size=4),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, protocol=st.integers(0, 5))
def test_plain_values_come_out_as_python_reads_them(value: Any, protocol: int) -> None:
    stream = pickle.dumps(value, protocol=protocol)
    result = unpickle(stream, DEFAULT_LIMITS)
    expected = pickle.loads(stream)
    # Sets of protocol 0 to 3 come through a call, and frozen or not is no difference to us.
    assert repr_of(result.value) == repr_of(expected)
    assert result.end == len(stream)


def repr_of(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return ("set", sorted(map(repr, value)))
    if isinstance(value, dict):
        return ("dict", [(repr_of(k), repr_of(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [repr_of(v) for v in value])
    return (type(value).__name__, repr(value))


@pytest.mark.parametrize("protocol", range(6))
def test_known_containers_become_plain_ones(protocol: int) -> None:
    counted: Any = Counter("aab")
    value = [OrderedDict(a=1, b=2), defaultdict(list, {"k": [1]}), counted, deque([1, 2]), bytearray(b"xy"), 1 + 2j]
    ordered, default, counter, queue, data, number = unpickle(pickle.dumps(value, protocol), DEFAULT_LIMITS).value  # type: ignore[misc]
    assert list(ordered.items()) == [("a", 1), ("b", 2)]
    assert default == {"k": [1]}
    assert counter == {"a": 2, "b": 1}
    assert queue == [1, 2] or (isinstance(queue, Opaque) and queue.items == [1, 2])
    assert bytes(data) == b"xy"
    assert isinstance(number, Opaque)


def test_shared_and_cyclic_values_keep_their_identity() -> None:
    shared = [1]
    cyclic: list[Any] = [shared, shared]
    cyclic.append(cyclic)
    value: Any = unpickle(pickle.dumps(cyclic), DEFAULT_LIMITS).value
    assert value[0] is value[1]
    assert value[2] is value


def test_every_prefix_of_a_pickle_is_called_truncated() -> None:
    stream = pickle.dumps({"a": [1, 2.5, "text", b"bytes", (None, True)], "b": {"c": 10**30}}, protocol=4)
    for length in range(len(stream)):
        with pytest.raises(CheckpointError) as caught:
            unpickle(stream[:length], DEFAULT_LIMITS)
        assert caught.value.kind == "truncated"


def test_limits_are_kept() -> None:
    many = pickle.dumps([object] * 1000, protocol=2)
    for limits in (Limits(opcodes=100), Limits(memory_bytes=100)):
        with pytest.raises(CheckpointError) as caught:
            unpickle(many, limits)
        assert caught.value.kind == "malformed"


def test_streams_of_random_opcodes_end_in_a_value_or_an_error() -> None:
    chance = random.Random(3)
    for _ in range(20_000):
        stream = bytes(chance.randrange(256) for _ in range(24)) + b"."
        try:
            unpickle(stream, DEFAULT_LIMITS)
        except CheckpointError:
            continue
