from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pdstack.engine import Overloaded, PrefillResult, Request, RequestCancelled, Reservation, Step
from pdstack.transfer import ClusterKey, TicketError, TransferError
from pdstack.transfer.ticket import Ticket, issue
from pdstack.worker.finished import FinishedRequests
from pdstack.worker.handlers import DecodeHandler, Handler, PrefillHandler
from pdstack.worker.jobs import Jobs
from pdstack.worker.metrics import WorkerMetrics
from pdstack.worker.requests import BadRequest

KEY = ClusterKey(b"k" * 64)
PROMPT = [1, 2, 3]


def make_ticket(request_id: str = "r#1", **changes: Any) -> Ticket:
    values: dict[str, Any] = {
        "request_id": request_id,
        "worker": "prefill-0",
        "incarnation": "i",
        "host": "127.0.0.1",
        "port": 1,
        "backend": "ucx",
        "blocks": (4,),
        "tokens": len(PROMPT),
        "generations": (0,),
        "layout": "l",
        "audience": "ns/tiny",
    }
    return issue(KEY, ttl_s=60, **{**values, **changes})


class Engine:
    """Remembers what is asked of it; fails as told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.overloaded = False
        self.gate: asyncio.Event | None = None
        self.cancelled = False

    async def prefill(self, request: Request) -> PrefillResult:
        self.calls.append(f"prefill {request.request_id}")
        if self.gate is not None:
            await self.gate.wait()
        return PrefillResult(50, None, [4], len(request.token_ids), 0, 0.1, 0.0)

    def release(self, key: str) -> None:
        self.calls.append(f"release {key}")

    async def reserve(self, request: Request) -> Reservation:
        if self.overloaded:
            raise Overloaded("the queue is full")
        self.calls.append("reserve")
        return Reservation([9], 0)

    def unreserve(self, key: str) -> None:
        self.calls.append(f"unreserve {key}")

    def quarantine(self, key: str) -> None:
        self.calls.append(f"quarantine {key}")

    async def decode(self, request: Request, first_token: int) -> AsyncIterator[Step]:
        yield Step([first_token])
        if self.gate is not None:
            await self.gate.wait()
        if self.cancelled:
            raise RequestCancelled(request.request_id)
        yield Step([51, 52], "length")

    def cancel(self, key: str) -> None:
        self.calls.append(f"cancel {key}")
        self.cancelled = True
        if self.gate is not None:
            self.gate.set()


class Agent:
    """A transfer agent without transfers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: TransferError | None = None
        self.released: Any = None

    def export(self, key: str, blocks: list[int], tokens: int, first_token: int, on_release: Any) -> Ticket:
        self.calls.append(f"export {key} {blocks} {tokens} {first_token}")
        self.released = on_release
        return make_ticket(key)

    async def fetch(self, ticket: Ticket, blocks: list[int]) -> Any:
        self.calls.append(f"fetch {ticket.request_id} {blocks}")
        if self.error is not None:
            raise self.error
        return SimpleNamespace(bytes=10, seconds=0.5, read_seconds=0.2, backend="ucx", transport="tcp", first_token=50)

    async def discard(self, ticket: Ticket) -> None:
        self.calls.append(f"discard {ticket.request_id}")


class Context:
    def __init__(self) -> None:
        self.stopped = asyncio.Event()

    def id(self) -> str:
        return "r"

    async def async_killed_or_stopped(self) -> None:
        await self.stopped.wait()


class Bench:
    def __init__(self, kind: Any) -> None:
        self.engine = Engine()
        self.agent = Agent()
        self.finished = FinishedRequests()
        jobs = Jobs("role", WorkerMetrics(CollectorRegistry()), self.finished)
        self.handler: Handler = kind(self.engine, self.agent, jobs, 100, 10)
        self.context = Context()

    async def run(self, ticket: Ticket | None = None, **request: Any) -> list[dict[str, Any]]:
        data: dict[str, Any] = {"token_ids": PROMPT, **request}
        if ticket is not None:
            data["disaggregated_params"] = {"kv_transfer_params": ticket.to_wire()}
        return [item async for item in self.handler.generate(data, self.context)]

    def record(self) -> dict[str, Any]:
        record = self.finished.get("r")
        assert record is not None
        return record


def test_prefill_gives_token_and_ticket() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        (item,) = await bench.run()
        assert item["token_ids"] == [50]
        assert item["finish_reason"] == "length"
        assert Ticket.from_wire(item["disaggregated_params"]["kv_transfer_params"]).request_id == "r#1"
        assert bench.agent.calls == ["export r#1 [4] 3 50"]
        assert bench.engine.calls == ["prefill r#1"], "the blocks stay until the export is released"
        bench.agent.released("r#1", "read")
        assert bench.engine.calls[-1] == "release r#1"

    asyncio.run(scenario())


def test_prefill_of_a_client_that_left_is_not_exported() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        bench.engine.gate = asyncio.Event()
        bench.context.stopped.set()
        assert await bench.run() == []
        assert bench.engine.calls == ["prefill r#1", "cancel r#1", "release r#1"]
        assert bench.agent.calls == []
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())


def test_decode_fetches_and_goes_on() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        items = await bench.run(make_ticket())
        assert items == [{"token_ids": [50]}, {"token_ids": [51, 52], "finish_reason": "length"}]
        assert bench.engine.calls == ["reserve"]
        assert bench.agent.calls == ["fetch r#1 [9]"]
        assert bench.record()["transfer"]["bytes"] == 10

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ticket", "error", "message"),
    [
        (None, BadRequest, "carries no ticket"),
        (make_ticket("other#1"), TicketError, "is for request 'other#1', wanted one for 'r'"),
        (make_ticket(tokens=4), TicketError, "covers 4 tokens, the prompt has 3"),
    ],
)
def test_decode_refuses_what_is_not_its_ticket(ticket: Ticket | None, error: type[Exception], message: str) -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        with pytest.raises(error, match=message):
            await bench.run(ticket)
        assert bench.engine.calls == []
        assert bench.agent.calls == []
        assert bench.record()["outcome"] == "refused"

    asyncio.run(scenario())


def test_overload_lets_prefill_free_the_export() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.engine.overloaded = True
        with pytest.raises(Overloaded):
            await bench.run(make_ticket())
        assert bench.agent.calls == ["discard r#1"]

    asyncio.run(scenario())


def test_blocks_of_a_failed_fetch_wait_until_nothing_writes_into_them() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        error = TransferError("the read took too long")
        error.quarantine = asyncio.get_running_loop().create_future()
        bench.agent.error = error
        with pytest.raises(TransferError, match="took too long"):
            await bench.run(make_ticket())
        await asyncio.sleep(0.01)
        assert bench.engine.calls == ["reserve", "quarantine r#1"], "the client knows, the blocks wait"
        error.quarantine.set_result(None)
        await asyncio.sleep(0.01)
        assert bench.engine.calls == ["reserve", "quarantine r#1", "unreserve r#1"]

    asyncio.run(scenario())


def test_decode_of_a_client_that_left_stops_the_engine() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.engine.gate = asyncio.Event()
        running = asyncio.create_task(bench.run(make_ticket()))
        while "reserve" not in bench.engine.calls:
            await asyncio.sleep(0.001)
        bench.context.stopped.set()
        assert await running == [{"token_ids": [50]}]
        assert bench.engine.calls == ["reserve", "cancel r#1"]
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())
