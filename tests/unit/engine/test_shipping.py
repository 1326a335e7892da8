"""Prompts that are shipped while they are computed, and decode's own prefix cache."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.unit.engine.conftest import MakeEngine
from tests.unit.engine.drive import greedy, prompt, scribble, tokens_of, within

from pdstack.engine import Engine, EngineError, Request, RequestCancelled

SIZE = 16


class Shipment:
    """Who ships the blocks of one prompt: keeps a copy of every block at the moment it was called final."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks: list[int] = []
        self.generations: list[int] = []
        self.steps: list[int] = []
        self.copied: list[np.ndarray] = []

    def admitted(self, blocks: list[int], generations: list[int], tokens: int) -> None:
        assert len(blocks) == len(generations) == -(-tokens // SIZE)
        assert not self.blocks, "told once"
        self.blocks, self.generations = blocks, generations

    def progress(self, ready: int) -> None:
        assert self.blocks and ready >= len(self.copied)
        self.steps.append(ready)
        self.take(ready)

    def take(self, ready: int) -> None:
        for block in self.blocks[len(self.copied) : ready]:
            self.copied.append(self.engine.pool.array[block].copy())

    async def run(self, request: Request) -> int:
        result = await self.engine.prefill(request, self.admitted, self.progress)
        assert result.blocks == self.blocks, "the blocks are those that were told"
        assert self.engine.generations(self.blocks) == self.generations
        self.take(len(self.blocks))
        return result.first_token


async def decoded(target: Engine, request: Request, shipped: Shipment, first_token: int) -> tuple[list[int], int]:
    """The answer over what was shipped, and how many blocks were held already."""
    there = await target.reserve(request)
    for at, block in enumerate(there.blocks):
        if at < there.held:
            assert np.array_equal(target.pool.array[block], shipped.copied[at]), "KV depends on more than its tokens"
        else:
            target.pool.array[block] = shipped.copied[at]
    tokens = [token async for step in target.decode(request, first_token) for token in step.token_ids]
    return tokens, there.held


def test_a_prompt_is_shipped_while_it_is_computed(make_engine: MakeEngine) -> None:
    source, target, alone = make_engine(prefill_chunk=32), make_engine(), make_engine()
    scribble(source)
    scribble(target)

    async def scenario() -> None:
        for length in (1, 16, 17, 100, 300):
            request = greedy(f"r{length}", prompt(length), 20)
            shipment = Shipment(source)
            first = await shipment.run(request)
            assert shipment.steps == list(range(2, (length - 1) // 32 * 2 + 1, 2)), "a report after each chunk"
            source.release(request.request_id)
            tokens, held = await decoded(target, request, shipment, first)
            assert (tokens, held) == (await tokens_of(alone, request), 0)

    asyncio.run(scenario())
    assert source.stats().used_blocks == target.stats().used_blocks == 0


def test_shipped_prompts_with_one_beginning_compute_it_once_in_blocks_of_their_own(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(kv_blocks=512)
    forward, all_admitted = engine.model.forward, threading.Event()

    def patient(*arguments: Any) -> Any:
        assert all_admitted.wait(20)
        return forward(*arguments)

    monkeypatch.setattr(engine.model, "forward", patient)
    requests = [greedy(f"r{at}", [*prompt(256), at + 40], 3) for at in range(16)]

    async def scenario() -> None:
        wanted = [(await tokens_of(make_engine(), request))[0] for request in requests[:3]]
        shipments = [Shipment(engine) for _ in requests]
        running = [
            asyncio.create_task(shipment.run(request)) for shipment, request in zip(shipments, requests, strict=True)
        ]
        while engine.stats().prefilling < 16:
            await asyncio.sleep(0)
        all_admitted.set()
        found = await asyncio.gather(*running)
        assert found[:3] == wanted
        assert len({block for shipment in shipments for block in shipment.blocks}) == 16 * 17, "each has its own blocks"
        for shipment in shipments:
            assert np.array_equal(shipment.copied[:16], shipments[0].copied[:16])
        assert engine.stats().cached_tokens >= 14 * 256
        for request in requests:
            assert engine.release(request.request_id)
        # And what is in the cache at admission is final at once.
        late = Shipment(engine)
        await late.run(greedy("late", prompt(256), 3))
        assert late.steps[0] == 15

    asyncio.run(within(60, scenario()))
    assert engine.stats().used_blocks == 16


def test_released_while_it_computes_frees_after_the_step(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_chunk=16, max_context=2048)

    async def scenario() -> None:
        shipment = Shipment(engine)
        request = greedy("gone", prompt(1500), 1)

        def progress(ready: int) -> None:
            shipment.progress(ready)
            if ready >= 10:
                engine.release("gone")

        with pytest.raises(RequestCancelled):
            await engine.prefill(request, shipment.admitted, progress)
        while engine.stats().used_blocks:
            await asyncio.sleep(0)
        assert not engine.release("gone")
        assert engine.stats().prompt_tokens == 0

    asyncio.run(within(20, scenario()))


@pytest.mark.parametrize("how", ["cancel", "leave", "fail"])
def test_blocks_that_were_told_stay_until_they_are_released(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    engine = make_engine(prefill_chunk=16)
    forward = engine.model.forward

    def broken(*_: Any) -> None:
        monkeypatch.setattr(engine.model, "forward", forward)
        raise MemoryError("no memory")

    async def scenario() -> None:
        shipment = Shipment(engine)
        began = asyncio.Event()

        def progress(ready: int) -> None:
            began.set()

        task = asyncio.create_task(engine.prefill(greedy("r", prompt(1500), 1), shipment.admitted, progress))
        await began.wait()
        if how == "cancel":
            assert engine.cancel("r")
        elif how == "leave":
            task.cancel()
        else:
            monkeypatch.setattr(engine.model, "forward", broken)
        with pytest.raises((RequestCancelled, asyncio.CancelledError, EngineError)):
            await task
        while engine.stats().prefilling:
            await asyncio.sleep(0)
        assert engine.stats().used_blocks == len(shipment.blocks), "a peer may be reading them"
        assert await tokens_of(engine, greedy("other", prompt(30), 2))
        assert engine.generations(shipment.blocks) == shipment.generations
        assert engine.release("r") and engine.stats().used_blocks == 0

    asyncio.run(within(20, scenario()))


def test_64_shipments_that_end_at_random_moments_leave_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=120, prefill_chunk=16, queue_timeout_s=60.0)
    source = random.Random(7)

    async def one(number: int) -> bool:
        name, after = f"r{number}", source.random() * 0.4
        # Half of them begin alike, so that blocks are copied between them all the time.
        text = [*prompt(source.choice((100, 200, 300)), number % 2 and number), number + 40]
        shipment = Shipment(engine)
        task = asyncio.create_task(shipment.run(greedy(name, text, 1)))
        await asyncio.sleep(after)
        how = source.choice(("release", "cancel", "leave", "wait"))
        if how == "release":
            engine.release(name)
        elif how == "cancel":
            engine.cancel(name)
        elif how == "leave":
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, BaseException):
            assert isinstance(result, RequestCancelled | asyncio.CancelledError), result
        elif how == "wait":
            # Nobody wrote into what was final, whoever ended meanwhile.
            assert engine.generations(shipment.blocks) == shipment.generations
            assert np.array_equal(shipment.copied, engine.pool.array[shipment.blocks])
        engine.release(name)
        return how == "wait"

    async def scenario() -> None:
        waited = await asyncio.gather(*(one(number) for number in range(64)))
        assert any(waited)
        while engine.stats().used_blocks:
            await asyncio.sleep(0)

    asyncio.run(within(60, scenario()))
    stats = engine.stats()
    assert (stats.waiting, stats.prefilling, stats.held_requests) == (0, 0, 0)
    assert engine._scheduler.sequences == {} and engine._clients == {}


def test_a_prompt_that_nobody_was_told_of_keeps_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=200)

    def refuse(*_: object) -> None:
        raise ValueError("no export")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="no export"):
            await engine.prefill(greedy("r", prompt(100), 1), refuse)
        await engine.reserve(greedy("all", prompt(100), 1900))
        waiting = asyncio.create_task(engine.prefill(greedy("waits", prompt(2000), 1), refuse))
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        assert engine.release("waits")
        with pytest.raises(RequestCancelled):
            await waiting
        assert engine.unreserve("all")
        while engine.stats().used_blocks:
            await asyncio.sleep(0)

    asyncio.run(within(20, scenario()))


# Decode's prefix cache


async def ship(source: Engine, request: Request) -> tuple[Shipment, int]:
    shipment = Shipment(source)
    first = await shipment.run(request)
    source.release(request.request_id)
    return shipment, first


def test_decode_keeps_prompts_and_answers_and_needs_only_the_rest(make_engine: MakeEngine) -> None:
    source, target, alone = make_engine(), make_engine(), make_engine()

    async def turn(name: str, tokens: list[int]) -> tuple[list[int], int]:
        request = greedy(name, tokens, 40)
        found, held = await decoded(target, request, *await ship(source, request))
        alone.clear_prefix_cache()
        assert found == await tokens_of(alone, request)
        return found, held

    async def scenario() -> None:
        first, held = await turn("one", prompt(100))
        assert held == 0
        # The last token chosen has no KV yet: 139 of 140 tokens, 8 full blocks.
        second, held = await turn("two", [*prompt(100), *first, *prompt(50, 3)])
        assert held == 8
        _, held = await turn("three", [*prompt(100), *first, *prompt(50, 3)][:128])
        assert held == 8, "decode computes nothing of a prompt, so all of it may be there"
        _, held = await turn("four", prompt(100))
        assert held == 6, "the partial last block always moves: decode goes on in it"
        assert second

    asyncio.run(within(60, scenario()))
    assert target.stats().used_blocks == 0 and target.stats().prompt_tokens == 0


def test_without_prefix_cache_decode_holds_nothing(make_engine: MakeEngine) -> None:
    source, target = make_engine(), make_engine(prefix_cache=False)

    async def scenario() -> None:
        for name in ("a", "b"):
            request = greedy(name, prompt(64), 20)
            assert (await decoded(target, request, *await ship(source, request)))[1] == 0

    asyncio.run(scenario())
    assert target.stats().cached_blocks == 0


def test_a_request_can_do_without_the_caches(make_engine: MakeEngine) -> None:
    source, target = make_engine(), make_engine()

    async def scenario() -> None:
        for name in ("a", "b"):
            request = replace(greedy(name, prompt(64), 20), reuse=False)
            assert (await decoded(target, request, *await ship(source, request)))[1] == 0

    asyncio.run(scenario())
    assert source.stats().cached_tokens == 0 and source.stats().prompt_tokens == 128


def test_many_at_once_share_a_prefix_and_never_write_it(make_engine: MakeEngine) -> None:
    source, target, alone = make_engine(), make_engine(kv_blocks=200), make_engine()
    requests = [greedy(f"r{at}", [*prompt(96), *([at] * (at % 20))], 50) for at in range(35, 65)]

    async def scenario() -> None:
        warm = greedy("warm", prompt(96), 1)
        await decoded(target, warm, *await ship(source, warm))
        shared = (await target.reserve(replace(warm, request_id="look"))).blocks
        before = target.pool.array[shared].copy()
        shipped = [await ship(source, request) for request in requests]
        found = await asyncio.gather(
            *(decoded(target, request, *each) for request, each in zip(requests, shipped, strict=True))
        )
        assert [held >= 6 for _, held in found] == [True] * len(requests)
        assert np.array_equal(target.pool.array[shared], before)
        assert [tokens for tokens, _ in found] == [await tokens_of(alone, request) for request in requests]
        target.unreserve("look")

    asyncio.run(within(60, scenario()))
    assert target.stats().used_blocks == 0


@pytest.mark.parametrize("quarantined", [False, True])
def test_what_was_verified_before_a_failure_need_not_move_again(make_engine: MakeEngine, quarantined: bool) -> None:
    source, target, alone = make_engine(), make_engine(), make_engine()

    async def scenario() -> None:
        request = greedy("first", prompt(100), 20)
        shipment, first = await ship(source, request)
        there = await target.reserve(request)
        for at in range(4):
            target.pool.array[there.blocks[at]] = shipment.copied[at]
        if quarantined:
            assert target.quarantine("first", verified=4)
            assert target.stats().quarantined_blocks == 8
        else:
            assert target.unreserve("first", verified=4)
        again = replace(request, request_id="again")
        new = await target.reserve(again)
        assert new.held == 4
        if quarantined:
            assert not set(new.blocks[4:]) & set(there.blocks), "something may still write into them"
            assert target.unreserve("first")
        for at in range(4, len(new.blocks)):
            target.pool.array[new.blocks[at]] = shipment.copied[at]
        tokens = [token async for step in target.decode(again, first) for token in step.token_ids]
        assert tokens == await tokens_of(alone, request)

    asyncio.run(within(20, scenario()))
    assert target.stats().used_blocks == target.stats().quarantined_blocks == 0


def test_of_what_was_not_verified_nothing_is_kept(make_engine: MakeEngine) -> None:
    target = make_engine()

    async def scenario() -> None:
        for verified, held in ((0, 0), (2, 2), (7, 6)):
            name = f"v{verified}"
            await target.reserve(greedy(name, prompt(100, verified), 5))
            target.unreserve(name, verified=verified)
            there = await target.reserve(greedy("look", prompt(100, verified), 5))
            assert there.held == held, "full blocks only"
            target.unreserve("look")

    asyncio.run(scenario())


def test_a_block_found_wrong_is_forgotten_with_what_builds_on_it(make_engine: MakeEngine) -> None:
    source, target = make_engine(), make_engine()

    async def scenario() -> None:
        request = greedy("r", prompt(100), 40)
        shipped = await ship(source, request)
        await decoded(target, request, *shipped)
        there = await target.reserve(replace(request, request_id="s"))
        assert there.held == 6
        target.forget(there.blocks[2:3])
        target.unreserve("s", verified=6)  # says what is not true any more
        there = await target.reserve(replace(request, request_id="t"))
        assert there.held == 2
        # A request that runs over a wrong block does not offer what it computes.
        async for step in target.decode(replace(request, request_id="t"), shipped[1]):
            target.forget(there.blocks[:1])
            assert step
        assert target.clear_prefix_cache() == 0
        assert (await target.reserve(replace(request, request_id="u"))).held == 0
        target.unreserve("u")

    asyncio.run(within(20, scenario()))
    assert target.stats().used_blocks == 0
