"""Which path is taken: the order, the evidence, and no change without both figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.transfer.choice import EARLY_EVERY, ENOUGH, EVIDENCE_BYTES, Choice

MIB = 1 << 20


def test_the_first_is_taken_and_the_others_are_looked_at_now_and_then() -> None:
    choice = Choice(["a", "b", "c"], recheck_every=100)
    picks = [choice.pick() for _ in range(3 * EARLY_EVERY)]
    assert picks.count("a") == 3 * (EARLY_EVERY - 1)
    assert [path for path in picks if path != "a"] == ["b", "c", "b"]
    for path in ("b", "c"):
        for _ in range(ENOUGH):
            choice.note(path, MIB, 1.0)
    assert [choice.pick() for _ in range(100)].count("a") == 99, "with enough evidence, one of a hundred"


def test_none_is_looked_at_where_that_is_switched_off() -> None:
    choice = Choice(["a", "b"], recheck_every=0)
    assert {choice.pick() for _ in range(300)} == {"a"}
    assert {Choice(["a"], recheck_every=2).pick() for _ in range(9)} == {"a"}


def test_a_faster_path_is_taken_with_both_figures() -> None:
    choice = Choice(["a", "b"], recheck_every=10)
    for _ in range(ENOUGH):
        assert choice.note("a", 10 * MIB, 1.0) is None
    for _ in range(ENOUGH - 1):
        assert choice.note("b", 20 * MIB, 1.0) is None, "that is not enough evidence"
    change = choice.note("b", 20 * MIB, 1.0)
    assert change is not None
    assert (change.before, change.after) == ("a", "b")
    assert (change.before_rate, change.after_rate) == (10 * MIB, 20 * MIB)
    assert choice.current == "b"
    assert choice.paths == ("b", "a")


def test_a_little_faster_or_a_little_evidence_is_not_enough() -> None:
    choice = Choice(["a", "b"], recheck_every=10)
    for number in range(9):
        choice.note("a", 10 * MIB, 1.0)
        # One lucky transfer is not the median.
        assert choice.note("b", 11 * MIB, 0.01 if number == 4 else 1.0) is None
    for _ in range(9):
        assert choice.note("b", EVIDENCE_BYTES - 1, 1e-9) is None, "a small transfer says nothing"
    assert choice.current == "a"


def test_a_path_that_fails_is_left() -> None:
    choice = Choice(["a", "b", "c"], recheck_every=10)
    assert choice.drop("b", "gone") is None, "it was not in use"
    change = choice.drop("a", "cut off")
    assert change is not None
    assert (change.before, change.after, change.before_rate, change.reason) == ("a", "c", None, "cut off")
    assert choice.drop("c", "the last one stays") is None
    assert choice.current == "c"
    assert choice.note("a", MIB, 1.0) is None
    assert choice.other("c") is None


def test_no_path_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no path"):
        Choice([], 1)


events = st.lists(
    st.tuples(st.sampled_from(["note", "drop", "pick"]), st.sampled_from("abc"), st.floats(0.01, 10)), max_size=80
)


@given(events, st.integers(0, 12))
def test_whatever_happens_the_choice_is_one_of_the_paths_left(
    history: list[tuple[str, str, float]], every: int
) -> None:
    choice = Choice(["a", "b", "c"], every)
    for what, path, seconds in history:
        before = choice.current
        if what == "pick":
            assert choice.pick() in choice.paths
            change = None
        else:
            change = choice.note(path, MIB, seconds) if what == "note" else choice.drop(path, "x")
        assert (change is None) == (choice.current == before)
        assert len(set(choice.paths)) == len(choice.paths) >= 1
