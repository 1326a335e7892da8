from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.engine.conftest import MakeEngine
from tests.unit.engine.drive import answer, greedy, hand_over, prompt, scribble, tokens_of, within
from tests.unit.engine.plain import PlainModel

from pdstack.engine import (
    ContextTooLong,
    Engine,
    EngineConfig,
    EngineError,
    EngineStopped,
    Overloaded,
    Request,
    RequestCancelled,
    SamplingParams,
)

LENGTHS = [1, 2, 15, 16, 17, 60, 127, 128, 129, 300]


async def alone(engine: Engine, requests: list[Request]) -> list[list[int]]:
    found = []
    for request in requests:
        found.append(await tokens_of(engine, request))
        engine.clear_prefix_cache()
    return found


async def together(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return list(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))


def requests_of_all_lengths(count: int = 12, **options: Any) -> list[Request]:
    return [greedy(f"r{length}", prompt(length), count, **options) for length in LENGTHS]


def test_greedy_answers_are_those_of_a_plain_full_computation(make_engine: MakeEngine, tiny: Path) -> None:
    plain = PlainModel(tiny)
    for length in (1, 17, 130):
        request = greedy("r", prompt(length), 20)
        assert asyncio.run(tokens_of(make_engine(), request)) == plain.greedy(prompt(length), 20)


def test_answers_do_not_depend_on_batching_chunks_threads_or_block_size(make_engine: MakeEngine) -> None:
    requests = requests_of_all_lengths()
    wanted = asyncio.run(alone(make_engine(), requests))
    assert len({tuple(tokens) for tokens in wanted}) == len(LENGTHS)
    for settings in (
        {},
        {"prefill_chunk": 16},
        {"prefill_chunk": 1024},
        {"threads": 2, "max_batch": 3},
        {"block_size": 32},
        {"prefix_cache": False},
    ):
        assert asyncio.run(together(make_engine(**settings), requests)) == wanted, settings


def test_a_prefix_from_the_cache_changes_nothing_but_the_work(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = greedy("r", prompt(300), 12)

    async def scenario() -> None:
        first = await tokens_of(engine, request)
        assert engine.stats().cached_tokens == 0
        assert await tokens_of(engine, request) == first
        assert engine.stats().cached_tokens == 288
        # Another end on the same beginning.
        other = greedy("r", [*prompt(300)[:200], *prompt(50, 9)], 12)
        shared = await tokens_of(engine, other)
        assert engine.stats().cached_tokens == 288 + 192
        engine.clear_prefix_cache()
        assert await tokens_of(engine, other) == shared

    asyncio.run(scenario())


def test_one_beginning_is_computed_once_even_if_all_ask_at_the_same_time(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=512)
    requests = [greedy(f"r{at}", [*prompt(256), at + 40], 3) for at in range(16)]
    wanted = asyncio.run(alone(make_engine(), requests))
    assert asyncio.run(together(engine, requests)) == wanted
    stats = engine.stats()
    assert stats.cached_tokens >= 14 * 256, stats
    assert stats.used_blocks == 0


@pytest.mark.parametrize("sampled", [False, True])
def test_prefill_here_and_decode_there_give_the_same_tokens(make_engine: MakeEngine, sampled: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11} if sampled else {}
    requests = requests_of_all_lengths(20, **options)
    wanted = asyncio.run(alone(make_engine(), requests))
    source, target = make_engine(), make_engine(prefill_chunk=64)
    scribble(target)

    async def scenario() -> None:
        for _ in range(2):  # the second time out of the prefix cache
            found = await asyncio.gather(*(hand_over(source, target, request) for request in requests))
            assert list(found) == wanted

    asyncio.run(scenario())
    assert source.stats().used_blocks == target.stats().used_blocks == 0
    assert target.stats().prompt_tokens == 0, "decode computed a prompt"


def test_an_answer_can_be_continued_by_another_worker(make_engine: MakeEngine) -> None:
    """What a frontend does when a decode worker dies: the prompt and the tokens so far go through prefill again."""
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        whole = asyncio.run(tokens_of(make_engine(), greedy("a", prompt(120), 40, **options)))
        rest = greedy("b", [*prompt(120), *whole[:13]], 27, **options)
        assert asyncio.run(tokens_of(make_engine(), rest)) == whole[13:]


def test_decode_without_reservation_is_refused(make_engine: MakeEngine) -> None:
    async def scenario() -> None:
        with pytest.raises(EngineError, match="unknown, wanted reserved"):
            async for _ in make_engine().decode(greedy("x", prompt(5), 3), 7):
                pass

    asyncio.run(scenario())


def test_a_first_token_that_ends_the_request_ends_it(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def scenario() -> None:
        for request, token, reason in (
            (greedy("one", prompt(5), 1), 50, "length"),
            (Request("eos", prompt(5), SamplingParams(max_tokens=9)), 2, "stop"),
        ):
            await engine.reserve(request)
            steps = [step async for step in engine.decode(request, token)]
            assert [(step.token_ids, step.finish_reason) for step in steps] == [([token], reason)]

    asyncio.run(scenario())
    assert engine.stats().used_blocks == 0


# Ends and sampling


def test_stop_tokens_end_an_answer_and_belong_to_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tokens = asyncio.run(tokens_of(engine, greedy("r", prompt(40), 30)))
    stop = tokens[9]
    at = tokens.index(stop)
    assert asyncio.run(answer(engine, greedy("r", prompt(40), 30, stop_token_ids=[stop]))) == (
        tokens[: at + 1],
        "stop",
    )
    assert asyncio.run(answer(engine, greedy("r", prompt(40), at + 1))) == (tokens[: at + 1], "length")


def test_before_min_tokens_no_stop_token_is_chosen(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tokens = asyncio.run(tokens_of(engine, greedy("r", prompt(40), 30)))
    found, reason = asyncio.run(answer(engine, greedy("r", prompt(40), 30, stop_token_ids=tokens[:1], min_tokens=8)))
    assert tokens[0] not in found[:8] and len(found) > 8
    assert reason == ("stop" if found[-1] == tokens[0] else "length")


def test_the_models_end_token_ends_unless_ignored(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def first_end() -> tuple[list[int], list[int]]:
        for seed in range(200):
            sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=100)
            tokens, reason = await answer(engine, Request("r", prompt(20), sampling))
            if reason == "stop":
                ignoring = SamplingParams(temperature=1.0, seed=seed, max_tokens=100, ignore_eos=True)
                return tokens, await tokens_of(engine, Request("r", prompt(20), ignoring))
        raise AssertionError("no answer ended by itself")

    ended, ignored = asyncio.run(first_end())
    assert ended[-1] == 2 and 2 not in ended[:-1]
    assert len(ignored) == 100 and ignored[: len(ended)] == ended


def test_seeds_repeat_and_differ(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def sampled(**options: Any) -> list[int]:
        return await tokens_of(engine, greedy("r", prompt(30), 25, temperature=1.0, **options))

    async def scenario() -> None:
        assert await sampled(seed=1) == await sampled(seed=1)
        assert await sampled(seed=1) != await sampled(seed=2)
        assert await sampled() != await sampled()
        assert await sampled(top_k=1) == await tokens_of(engine, greedy("r", prompt(30), 25))
        assert await sampled(top_p=1e-9) == await tokens_of(engine, greedy("r", prompt(30), 25))

    asyncio.run(scenario())


# Limits


def test_the_context_limit_is_enforced(make_engine: MakeEngine) -> None:
    engine = make_engine(max_context=128)
    with pytest.raises(ContextTooLong, match="128 tokens, wanted at most 127"):
        asyncio.run(tokens_of(engine, greedy("r", prompt(128), 5)))
    tokens, reason = asyncio.run(answer(engine, greedy("r", prompt(120), 50)))
    assert (len(tokens), reason) == (8, "length")


def test_a_context_that_the_model_does_not_have_is_refused(tiny: Path) -> None:
    with pytest.raises(EngineError, match="wanted at most 8192"):
        Engine.load(tiny, EngineConfig(max_context=8193))


def test_a_request_that_can_never_fit_is_refused_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=4)
    with pytest.raises(ContextTooLong, match="need 7 KV blocks, the pool has 4"):
        asyncio.run(tokens_of(engine, greedy("r", prompt(50), 51)))


@pytest.mark.parametrize("tokens", [[], [-1], [320]])
def test_nonsense_prompts_are_refused(make_engine: MakeEngine, tokens: list[int]) -> None:
    with pytest.raises(EngineError, match=r"wanted at least one token|wanted 0 to 319"):
        asyncio.run(tokens_of(make_engine(), greedy("r", tokens, 5)))


def test_an_exhausted_pool_queues_then_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=8, queue_timeout_s=0.3)

    async def scenario() -> None:
        held = await engine.prefill(greedy("held", prompt(100), 1))
        assert len(held.blocks) == 7
        # Waits, and runs once there is room.
        waiting = asyncio.create_task(engine.reserve(greedy("patient", prompt(40), 8)))
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        engine.release("held")
        assert len((await within(5, waiting)).blocks) == 3
        # Waits in vain.
        with pytest.raises(Overloaded, match=r"waited 0.3 s for 6 KV blocks"):
            await engine.reserve(greedy("vain", prompt(90), 2))
        engine.unreserve("patient")
        assert await tokens_of(engine, greedy("after", prompt(90), 2))

    asyncio.run(scenario())
    assert engine.stats().used_blocks == 0
    assert engine.stats().refused == 1


def test_a_full_queue_refuses_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=8, queue_limit=1)

    async def scenario() -> None:
        await engine.reserve(greedy("a", prompt(100), 2))
        waiting = asyncio.create_task(engine.reserve(greedy("b", prompt(100), 2)))
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="queue full"):
            await engine.reserve(greedy("c", prompt(100), 2))
        engine.unreserve("a")
        await within(5, waiting)
        engine.unreserve("b")

    asyncio.run(scenario())


def test_no_queue_still_serves_what_can_start(make_engine: MakeEngine) -> None:
    engine = make_engine(queue_limit=0, max_batch=1)

    async def scenario() -> None:
        assert len(await tokens_of(engine, greedy("a", prompt(10), 4))) == 4
        await engine.reserve(greedy("b", prompt(10), 4))
        with pytest.raises(Overloaded):
            await engine.reserve(greedy("c", prompt(10), 4))
        engine.unreserve("b")

    asyncio.run(scenario())


def test_request_ids_are_unique(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def scenario() -> None:
        await engine.reserve(greedy("same", prompt(10), 4))
        with pytest.raises(EngineError, match="already known"):
            await engine.reserve(greedy("same", prompt(10), 4))
        engine.unreserve("same")

    asyncio.run(scenario())
    assert engine.stats().used_blocks == 0


def test_a_long_prompt_does_not_block_a_short_one(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_chunk=16, kv_blocks=512, max_context=4096)
    order: list[str] = []

    async def scenario() -> None:
        async def one(name: str, length: int) -> None:
            await tokens_of(engine, greedy(name, prompt(length), 2))
            order.append(name)

        long = asyncio.create_task(one("long", 2000))
        while not engine.stats().steps:
            await asyncio.sleep(0)
        await one("short", 30)
        await long

    asyncio.run(scenario())
    assert order == ["short", "long"]


# Cancelling


def test_cancelling_frees_at_once_and_leaves_others_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    wanted = asyncio.run(tokens_of(engine, greedy("r", prompt(30), 60)))

    async def scenario() -> None:
        other = asyncio.create_task(tokens_of(engine, greedy("other", prompt(30), 60)))
        seen: list[Any] = []
        async for step in engine.generate(greedy("gone", prompt(200), 1000)):
            seen.append(step)
            if len(seen) == 3:
                assert engine.cancel("gone")
                assert not engine.cancel("gone")
        assert seen[-1].finish_reason == "cancelled"
        assert await other == wanted
        while engine.stats().used_blocks:  # the step under way may still use them
            await asyncio.sleep(0)

    asyncio.run(within(20, scenario()))
    assert engine.stats().cancelled == 1


def test_leaving_a_stream_cancels_it(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def scenario() -> None:
        stream = engine.generate(greedy("left", prompt(30), 1000))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator, annotated by what callers need
        task = asyncio.create_task(tokens_of(engine, greedy("killed", prompt(30), 1000)))
        while not engine.stats().decoding:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.stats().used_blocks:
            await asyncio.sleep(0)

    asyncio.run(within(20, scenario()))


def test_cancelling_what_waits_or_prefills_raises_there(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=1, prefill_chunk=16)

    async def scenario() -> None:
        computing = asyncio.create_task(engine.prefill(greedy("computing", prompt(1500), 1)))
        waiting = asyncio.create_task(engine.prefill(greedy("waiting", prompt(50), 1)))
        while not engine.stats().waiting:
            await asyncio.sleep(0)
        for name, task in (("waiting", waiting), ("computing", computing)):
            assert engine.cancel(name)
            with pytest.raises(RequestCancelled):
                await task
        while engine.stats().used_blocks:
            await asyncio.sleep(0)

    asyncio.run(within(20, scenario()))


def test_blocks_that_a_peer_may_touch_survive_a_cancel(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def scenario() -> None:
        await engine.prefill(greedy("held", prompt(30), 1))
        await engine.reserve(greedy("reserved", prompt(30, 1), 2))
        assert not engine.cancel("held") and not engine.cancel("reserved")
        assert engine.stats().used_blocks == 4
        assert engine.quarantine("reserved")
        assert engine.stats().quarantined_blocks == 2 and engine.stats().reserved_requests == 0
        assert engine.release("held") and not engine.release("held")
        assert engine.unreserve("reserved") and not engine.unreserve("reserved")
        assert engine.stats().used_blocks == 0

    asyncio.run(scenario())


def test_64_streams_with_random_cancellations_leave_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=160, queue_timeout_s=60.0)
    source = random.Random(4)
    requests = [greedy(f"r{at}", prompt(source.choice(LENGTHS), at % 9), source.randrange(1, 60)) for at in range(64)]
    wanted = asyncio.run(together(make_engine(kv_blocks=2048), requests))

    async def scenario() -> list[Any]:
        async def one(request: Request, leave_after: int | None) -> list[int] | None:
            tokens: list[int] = []
            async for step in engine.generate(request):
                tokens += step.token_ids
                if leave_after is not None and len(tokens) >= leave_after and step.finish_reason is None:
                    engine.cancel(request.request_id)
                if step.finish_reason == "cancelled":
                    return None
            return tokens

        return await asyncio.gather(
            *(one(request, source.randrange(1, 20) if at % 3 == 0 else None) for at, request in enumerate(requests))
        )

    found = asyncio.run(within(120, scenario()))
    assert [a for a, b in zip(found, wanted, strict=True) if a is not None and a != b] == []
    stats = engine.stats()
    assert stats.cancelled > 5 and stats.finished + stats.cancelled == 64
    assert (stats.used_blocks, stats.waiting, stats.prefilling, stats.decoding) == (0, 0, 0, 0)


# Life


def test_a_failed_step_costs_its_requests_only(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    forward = engine.model.forward

    def fail(*arguments: Any) -> np.ndarray:
        monkeypatch.setattr(engine.model, "forward", forward)
        raise MemoryError("no memory")

    monkeypatch.setattr(engine.model, "forward", fail)
    with pytest.raises(EngineError, match="a step failed: MemoryError"):
        asyncio.run(tokens_of(engine, greedy("a", prompt(10), 4)))
    assert engine.alive and engine.stats().used_blocks == 0
    assert len(asyncio.run(tokens_of(engine, greedy("b", prompt(10), 4)))) == 4


def test_stopping_ends_what_is_under_way(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def scenario() -> None:
        task = asyncio.create_task(tokens_of(engine, greedy("a", prompt(10), 1500)))
        while not engine.stats().decoding:
            await asyncio.sleep(0)
        assert engine.alive
        engine.stop()
        with pytest.raises(EngineStopped):
            await task
        assert not engine.alive and engine.stats().used_blocks == 0
        with pytest.raises(EngineStopped, match="not running"):
            await tokens_of(engine, greedy("b", prompt(10), 4))

    asyncio.run(within(20, scenario()))


def test_cache_changes_reach_the_sink_in_order(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=8)
    calls: list[tuple[Any, ...]] = []

    class Sink:
        def stored(self, token_ids: Any, block_hashes: Any, parent_hash: Any) -> None:
            calls.append(("stored", list(token_ids), list(block_hashes), parent_hash))

        def removed(self, block_hashes: Any) -> None:
            calls.append(("removed", list(block_hashes)))

    engine.events = Sink()

    async def scenario() -> None:
        for at in range(3):
            await engine.prefill(greedy(f"r{at}", prompt(70, at), 1))
            engine.release(f"r{at}")

    asyncio.run(scenario())
    stored = [call for call in calls if call[0] == "stored"]
    assert [call[1] for call in stored] == [prompt(70, at)[:64] for at in range(3)]
    assert all(len(call[2]) == 4 and call[3] is None for call in stored)
    gone = [value for call in calls if call[0] == "removed" for value in call[1]]
    assert set(gone) < {value for call in stored for value in call[2]} and gone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 12}, "wanted a divisor of 128"),
        ({"prefill_chunk": 100}, "wanted a multiple of block_size 16"),
        ({"kv_blocks": 0}, "wanted a whole number of at least 1"),
        ({"queue_timeout_s": 0.0}, "wanted more than 0 seconds"),
        ({"blocksize": 16}, "unknown settings blocksize"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_dict(settings)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -2}, {"max_tokens": 0}, {"min_tokens": -1}],
)
def test_sampling_that_can_not_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="found"):
        SamplingParams(**options)
