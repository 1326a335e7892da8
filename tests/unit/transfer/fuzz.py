"""What the fuzz tests share: how long they run, how many cases there were, and what a peer may say.

PDSTACK_FUZZ is a factor: 1 is a few seconds and always the same cases, more is longer, with other cases each time.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

FACTOR = int(os.environ.get("PDSTACK_FUZZ", "1"))
CASES: Counter[str] = Counter()


def count(what: str) -> None:
    CASES[what] += 1


def settings(cases: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=cases * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


long = settings(100)
texts = st.text(st.characters(), max_size=20) | st.sampled_from(["\ud800", "\0", "\n", "x" * 600, "9" * 5000])
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([1 << 53, 1 << 63, 1 << 64, -(1 << 63), 10**400, 1e308, float("inf"), float("nan"), -0.0])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def changed(genuine: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """`genuine` with some fields of any other value, some left out, some added."""
    names = st.sampled_from(sorted(genuine))
    return st.builds(
        lambda swap, drop, more: {k: v for k, v in {**more, **genuine, **swap}.items() if k not in drop},
        st.dictionaries(names, values, max_size=3),
        st.just(()) | st.lists(names, max_size=2),
        st.just({}) | st.dictionaries(texts, values, max_size=2),
    )


@st.composite
def mutated(draw: st.DrawFn, genuine: bytes) -> bytes:
    """`genuine` with some bytes changed, cut out or put in."""
    data = bytearray(genuine)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = at + draw(st.integers(0, 3))
        data[at:end] = draw(st.binary(max_size=3))
    return bytes(data)


def documents(genuine: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bytes that are nothing, JSON of anything, or nearly `genuine`."""
    # Python writes what it reads: Infinity, NaN, numbers of any length.
    return (
        st.binary(max_size=200)
        | values.map(lambda value: json.dumps(value).encode())
        | changed(genuine).map(lambda value: json.dumps(value).encode())
        | mutated(json.dumps(genuine).encode())
    )
