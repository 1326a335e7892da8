from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdstack.engine.sampling import greedy, sample, uniform

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))


def draws(count: int, logits: np.ndarray = LOGITS, **options: float) -> np.ndarray:
    given_options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **options}
    return np.bincount(
        [sample(logits, seed=3, position=at, **given_options) for at in range(count)], minlength=logits.size
    )


def test_frequencies_follow_the_distribution() -> None:
    counts = draws(4000)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)


def test_temperature_sharpens() -> None:
    np.testing.assert_allclose(draws(4000, temperature=0.5)[0] / 4000, 0.25 / 0.34375, atol=0.03)


@pytest.mark.parametrize(("top_k", "kept"), [(1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (0, {0, 1, 2, 3})])
def test_top_k_keeps_the_likeliest(top_k: int, kept: set[int]) -> None:
    assert set(np.flatnonzero(draws(500, top_k=top_k))) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(np.flatnonzero(draws(500, top_p=top_p))) == kept


def test_top_p_counts_within_top_k() -> None:
    # Of 0.5 and 0.25, the first alone is two thirds.
    assert set(np.flatnonzero(draws(500, top_k=2, top_p=0.6))) == {0}


def test_top_p_over_more_words_than_the_short_list() -> None:
    flat = np.zeros(5000, dtype=np.float32)
    counts = draws(2000, flat, top_p=0.5)
    assert not counts[2501:].any() and counts[1500:2500].any()


@given(st.integers(), st.integers(0, 1 << 40))
def test_randomness_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0 and value == uniform(seed, position)


def test_other_seeds_and_positions_differ() -> None:
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900


@pytest.mark.parametrize("vocabulary", [64, 320, 1000])
def test_greedy_takes_the_first_largest(vocabulary: int) -> None:
    logits = np.random.RandomState(1).randint(0, 5, (vocabulary, 7)).astype(np.float32)
    assert greedy(logits).tolist() == logits.argmax(axis=0).tolist()
