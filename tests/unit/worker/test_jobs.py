from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pdstack.worker.finished import FinishedRequests
from pdstack.worker.jobs import Interrupted, Job, Jobs
from pdstack.worker.metrics import WorkerMetrics


class Context:
    """Dynamo's context, as far as we use it."""

    def __init__(self, request_id: str = "r") -> None:
        self._id = request_id
        self.stopped = asyncio.Event()

    def id(self) -> str:
        return self._id

    async def async_killed_or_stopped(self) -> None:
        await self.stopped.wait()


class Refusal(Exception):
    pass


class Bench:
    """Jobs with everything around them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.finished = FinishedRequests()
        self.jobs = Jobs("decode", WorkerMetrics(self.registry), self.finished)
        self.cancelled: list[str] = []

    def serve(self, context: Context, work: Callable[[Job], Awaitable[None]]) -> Any:
        request = {"token_ids": [1, 2, 3]}
        return self.jobs.serve(request, context, work, lambda job: self.cancelled.append(job.key), (Refusal,))

    def count(self, outcome: str) -> float:
        return self.registry.get_sample_value("pdstack_requests_total", {"outcome": outcome}) or 0


async def two_tokens(job: Job) -> None:
    job.give([5], None)
    await asyncio.sleep(0)
    job.give([6], "length", extra=1)


def test_items_record_and_metrics() -> None:
    async def scenario() -> None:
        bench = Bench()
        items = [item async for item in bench.serve(Context(), two_tokens)]
        assert items == [{"token_ids": [5]}, {"token_ids": [6], "finish_reason": "length", "extra": 1}]
        record = bench.finished.get("r")
        assert record is not None
        assert record["token_ids"] == [5, 6]
        assert record["outcome"] == "ok"
        assert record["prompt_tokens"] == 3
        assert record["finish_reason"] == "length"
        assert record["error"] is None
        assert bench.count("ok") == 1
        assert bench.registry.get_sample_value("pdstack_generated_tokens_total") == 2
        assert bench.registry.get_sample_value("pdstack_prompt_tokens_total") == 3
        assert bench.registry.get_sample_value("pdstack_time_to_first_token_seconds_count") == 1
        assert bench.registry.get_sample_value("pdstack_inter_token_latency_seconds_count") == 1
        assert bench.jobs.in_flight == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(("error", "outcome"), [(Refusal("no"), "refused"), (RuntimeError("broken"), "error")])
def test_errors_reach_the_client_after_the_items(error: Exception, outcome: str) -> None:
    async def work(job: Job) -> None:
        job.give([5], None)
        raise error

    async def scenario() -> None:
        bench = Bench()
        items = []
        with pytest.raises(type(error), match=str(error)):
            async for item in bench.serve(Context(), work):
                items.append(item)
        assert items == [{"token_ids": [5]}]
        assert bench.count(outcome) == 1
        record = bench.finished.get("r")
        assert record is not None
        assert record["error"] == f"{type(error).__name__}: {error}"

    asyncio.run(scenario())


def test_cancel_ends_the_work_even_if_nobody_closes_the_generator() -> None:
    async def scenario() -> None:
        bench = Bench()
        context = Context()
        stop = asyncio.Event()

        async def work(job: Job) -> None:
            job.give([5], None)
            await stop.wait()
            job.check()

        items = bench.serve(context, work)
        assert await anext(items) == {"token_ids": [5]}
        assert bench.jobs.in_flight == 1
        idle = asyncio.create_task(bench.jobs.wait_idle())
        context.stopped.set()
        await asyncio.sleep(0.01)
        assert bench.cancelled == ["r#1"]
        assert not idle.done()
        stop.set()  # what on_cancel makes the engine do
        await asyncio.wait_for(idle, 1)
        assert bench.jobs.in_flight == 0
        assert bench.count("cancelled") == 1
        assert [item async for item in items] == []

    asyncio.run(scenario())


def test_an_error_after_the_client_left_is_a_cancellation() -> None:
    async def scenario() -> None:
        bench = Bench()
        context = Context()
        context.stopped.set()

        async def work(job: Job) -> None:
            await asyncio.sleep(0.01)
            raise RuntimeError("the engine dropped it")

        with pytest.raises(RuntimeError):
            async for _ in bench.serve(context, work):
                pass
        assert bench.count("cancelled") == 1

    asyncio.run(scenario())


def test_work_goes_on_after_the_end_of_its_stream() -> None:
    async def scenario() -> None:
        bench = Bench()
        context = Context()
        proceed = asyncio.Event()

        async def work(job: Job) -> None:
            job.give([], None, ticket=1)
            job.end_stream()
            await proceed.wait()
            job.note([7], "length")

        assert [item async for item in bench.serve(context, work)] == [{"token_ids": [], "ticket": 1}]
        assert bench.jobs.in_flight == 1, "a worker that drains waits for it"
        context.stopped.set()
        await asyncio.sleep(0.01)
        assert bench.cancelled == [], "who leaves after the end of the stream is no matter of this request"
        proceed.set()
        await asyncio.wait_for(bench.jobs.wait_idle(), 1)
        record = bench.finished.get("r")
        assert record is not None
        assert (record["outcome"], record["token_ids"], record["finish_reason"]) == ("ok", [7], "length")
        assert bench.registry.get_sample_value("pdstack_time_to_first_token_seconds_count") == 1

    asyncio.run(scenario())


def test_two_attempts_of_one_request_have_different_keys() -> None:
    async def scenario() -> None:
        bench = Bench()
        keys = []

        async def work(job: Job) -> None:
            keys.append(job.key)

        for _ in range(2):
            assert [item async for item in bench.serve(Context("same"), work)] == []
        assert keys == ["same#1", "same#2"]

    asyncio.run(scenario())


async def never_ends(job: Job) -> None:
    job.give([5], None)
    await asyncio.Event().wait()


def test_an_answer_that_is_cut_never_looks_whole() -> None:
    async def scenario() -> None:
        bench = Bench()
        items = bench.serve(Context(), never_ends)
        assert await anext(items) == {"token_ids": [5]}
        for task in bench.jobs._tasks.values():
            task.cancel()  # as asyncio does when the process ends
        with pytest.raises(Interrupted):
            await anext(items)

    asyncio.run(scenario())


def test_an_abandoned_stream_has_no_end() -> None:
    async def fails(job: Job) -> None:
        job.give([5], None)
        raise RuntimeError("the engine was stopped")

    async def scenario() -> None:
        bench = Bench()
        items = bench.serve(Context(), fails)
        bench.jobs.abandon()
        assert await anext(items) == {"token_ids": [5]}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(items), 0.05)
        assert bench.jobs.in_flight == 0

    asyncio.run(scenario())
