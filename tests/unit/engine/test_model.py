from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tests.unit.engine.drive import prompt
from tests.unit.engine.plain import PlainModel

from pdstack.engine.blas import set_threads
from pdstack.engine.model import LlamaModel, Segment
from pdstack.engine.pool import new_pool_array


@pytest.fixture(scope="module")
def model(tiny: Path) -> LlamaModel:
    set_threads(1)
    model = LlamaModel(tiny)
    assert model.prepare(1024, 192), "products depend on their batch with this BLAS"
    return model


def new_pool(model: LlamaModel, blocks: int = 80, block_size: int = 16) -> np.ndarray:
    shape = model.config
    pool = new_pool_array(blocks, shape.layers, block_size, shape.kv_heads, shape.head_dim)
    pool[:] = 3.7  # what earlier requests left
    return pool


def run(model: LlamaModel, tokens: list[int], cuts: list[int], pool: np.ndarray, blocks: list[int]) -> np.ndarray:
    """Logits of the last token of each chunk."""
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        found.append(model.forward([Segment(tokens[start:end], start, blocks, True)], pool)[:, 0])
    return np.array(found)


def test_logits_are_those_of_a_plain_full_computation(model: LlamaModel, tiny: Path) -> None:
    tokens = prompt(150)
    cuts = [40, 41, 128]
    found = run(model, tokens, cuts, new_pool(model), list(range(7, 17)))
    wanted = PlainModel(tiny).logits(tokens)[[*(cut - 1 for cut in cuts), 149]]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_bits_do_not_depend_on_where_chunks_end(model: LlamaModel, block_size: int) -> None:
    tokens = prompt(300)
    blocks = list(range(3, 3 + -(-300 // block_size)))
    whole = new_pool(model, block_size=block_size)
    logits = run(model, tokens, [], whole, blocks)[-1]
    source = random.Random(1)
    for cuts in (
        list(range(1, 300)),
        list(range(16, 300, 16)),
        [128, 256],
        [299],
        *(sorted(source.sample(range(1, 300), 9)) for _ in range(4)),
    ):
        pool = new_pool(model, block_size=block_size)
        found = run(model, tokens, cuts, pool, blocks)[-1]
        assert np.array_equal(found, logits), cuts
        assert np.array_equal(pool[blocks], whole[blocks]), cuts


def test_bits_do_not_depend_on_the_number_of_threads(model: LlamaModel, tiny: Path) -> None:
    tokens = prompt(300)
    blocks = list(range(3, 22))
    wanted = run(model, tokens, [128, 256, 299], new_pool(model), blocks)
    for threads in (2, 3):
        other = LlamaModel(tiny, threads)
        other.prepare(1024, 192)
        # The tiny model's matrices are too small to be divided of themselves.
        other._parts = {shape: [slice(0, 48), slice(48, shape[0])] for shape in other._parts}
        assert np.array_equal(run(other, tokens, [128, 256, 299], new_pool(model), blocks), wanted)
        other.team.close()


def test_bits_do_not_depend_on_the_batch(model: LlamaModel) -> None:
    lengths = [1, 2, 15, 16, 17, 100, 127, 128, 129, 200]
    prompts = [prompt(length, 5) for length in lengths]
    tables = [list(range(100 * at, 100 * at + 14)) for at in range(len(lengths))]
    pool = new_pool(model, 1100)
    alone = [model.forward([Segment(p, 0, t, True)], pool)[:, 0] for p, t in zip(prompts, tables, strict=True)]
    again = new_pool(model, 1100)
    first = [Segment(p[:-1], 0, t, False) for p, t in zip(prompts, tables, strict=True) if len(p) > 1]
    model.forward(first, again)
    rest = [Segment(p[-1:], len(p) - 1, t, True) for p, t in zip(prompts, tables, strict=True)]
    together = model.forward(rest, again)
    for at, logits in enumerate(alone):
        assert np.array_equal(together[:, at], logits), lengths[at]


def test_what_earlier_requests_left_in_memory_is_never_read(model: LlamaModel) -> None:
    tokens = prompt(70)
    blocks = [4, 2, 9, 1, 8]
    clean = new_pool(model)
    clean[:] = 0
    poisoned = new_pool(model)
    poisoned[:] = np.nan
    wanted = run(model, tokens, [33, 34, 35], clean, blocks)
    assert np.array_equal(run(model, tokens, [33, 34, 35], poisoned, blocks), wanted)
