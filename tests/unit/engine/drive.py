"""Short ways to run requests in tests."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import numpy as np

from pdstack.engine import Engine, Request, SamplingParams

T = TypeVar("T")


def prompt(length: int, seed: int = 0) -> list[int]:
    source = random.Random(f"{length}/{seed}")
    return [source.randrange(35, 130) for _ in range(length)]


def greedy(name: str, tokens: Sequence[int], count: int, **options: Any) -> Request:
    return Request(name, tokens, SamplingParams(max_tokens=count, ignore_eos=True, **options))


async def answer(engine: Engine, request: Request) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for step in engine.generate(request):
        tokens += step.token_ids
        reason = step.finish_reason
    return tokens, reason


async def tokens_of(engine: Engine, request: Request) -> list[int]:
    return (await answer(engine, request))[0]


async def hand_over(source: Engine, target: Engine, request: Request) -> list[int]:
    """Prefill on one engine, copy the blocks, decode on the other: what a disaggregated deployment does."""
    result = await source.prefill(request)
    there = await target.reserve(request)
    assert len(there.blocks) == len(result.blocks)
    # What is held is compared, as decode does by hash; the rest moves.
    assert np.array_equal(target.pool.array[there.blocks[: there.held]], source.pool.array[result.blocks[: there.held]])
    target.pool.array[there.blocks[there.held :]] = source.pool.array[result.blocks[there.held :]]
    source.release(request.request_id)
    tokens: list[int] = []
    async for step in target.decode(request, result.first_token):
        tokens += step.token_ids
    return tokens


def scribble(engine: Engine) -> None:
    """Fill all memory with numbers that would show in any answer that read them."""
    engine.pool.array[:] = np.float32(3.7)


async def within(seconds: float, work: Awaitable[T]) -> T:
    import asyncio

    async with asyncio.timeout(seconds):
        return await work
