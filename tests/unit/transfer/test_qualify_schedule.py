"""Rounds of measurements: every pair once, no place twice in a round, and no more rounds than needed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pdstack.transfer.qualify.schedule import rounds

numbers = st.integers(1, 12)
fast = settings(derandomize=True, deadline=None, max_examples=150)


def check(prefill: list[str], decode: list[str]) -> int:
    """Returns the number of rounds, after looking at all of them."""
    found = rounds(prefill, decode)
    wanted = [(p, d) for p in range(len(prefill)) for d in range(len(decode))]
    assert sorted(pair for pairs in found for pair in pairs) == wanted
    for pairs in found:
        places = Counter(place for p, d in pairs for place in {prefill[p], decode[d]})
        assert max(places.values()) == 1, f"a place is measured twice in one round: {places}"
    return len(found)


def busiest(prefill: list[str], decode: list[str]) -> int:
    return max(Counter(place for p in prefill for d in decode for place in {p, d}).values())


@fast
@given(numbers, numbers)
def test_distinct_hosts_need_as_many_rounds_as_the_larger_role_has_agents(p: int, d: int) -> None:
    found = check([f"p{n}" for n in range(p)], [f"d{n}" for n in range(d)])
    assert found == max(p, d)


@fast
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), st.lists(st.sampled_from("wxyz"), min_size=1))
def test_hosts_with_several_agents_of_one_role_need_as_many_rounds_as_the_busiest(
    prefill: list[str], decode: list[str]
) -> None:
    assert check(prefill, decode) == busiest(prefill, decode)


@fast
@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9),
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9),
)
def test_hosts_with_both_roles_need_fewer_than_twice_as_many(prefill: list[str], decode: list[str]) -> None:
    assert check(prefill, decode) <= 2 * busiest(prefill, decode) - 1


def test_one_host_measures_one_pair_at_a_time() -> None:
    assert check(["here"] * 3, ["here"] * 4) == 12
