from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pdstack.engine import EngineError, Overloaded, PrefillResult, Request, RequestCancelled, Reservation, Step
from pdstack.transfer import ClusterKey, PeerUnreachable, ReadTimeout, TicketError, TransferError
from pdstack.transfer.audit import AuditLog
from pdstack.transfer.ticket import Ticket, issue
from pdstack.worker.again import AskAgainFailed
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
        "generations": (7,),
        "tokens": len(PROMPT),
        "layout": "l",
        "audience": "ns/tiny",
    }
    return issue(KEY, ttl_s=60, **{**values, **changes})


class Engine:
    """Remembers what is asked of it; fails as told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.overloaded = False
        self.broken = False
        self.gate: asyncio.Event | None = None
        self.cancelled = False

    async def prefill(self, request: Request, on_admitted: Any, on_progress: Any) -> PrefillResult:
        self.calls.append(f"prefill {request.request_id}")
        await asyncio.sleep(0)
        on_admitted([4], [7], len(request.token_ids))
        on_progress(1)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise EngineError("a step failed")
        if self.cancelled:
            raise RequestCancelled(request.request_id)
        return PrefillResult(50, None, [4], len(request.token_ids), 0, 0.1, 0.0)

    def release(self, key: str) -> None:
        self.calls.append(f"release {key}")
        self.cancelled = True

    async def reserve(self, request: Request) -> Reservation:
        if self.overloaded:
            raise Overloaded("the queue is full")
        self.calls.append(f"reserve {request.request_id}")
        return Reservation([8, 9], 1)

    def unreserve(self, key: str, verified: int = 0) -> None:
        self.calls.append(f"unreserve {key} {verified}")

    def quarantine(self, key: str, verified: int) -> None:
        self.calls.append(f"quarantine {key} {verified}")

    def forget(self, blocks: list[int]) -> None:
        self.calls.append(f"forget {blocks}")

    async def decode(self, request: Request, first_token: int) -> AsyncIterator[Step]:
        self.calls.append(f"decode {request.request_id}")
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
        self.audit = AuditLog("", 1, 1)
        self.errors: list[TransferError] = []
        self.released: Any = None
        self.stuck = False

    def export(
        self, key: str, blocks: list[int], tokens: int, first_token: int | None, on_release: Any, generations: list[int]
    ) -> Ticket:
        self.calls.append(f"export {key} {blocks} {tokens} {first_token} {generations}")
        self.released = on_release
        return make_ticket(key)

    def advance(self, key: str, ready: int) -> None:
        self.calls.append(f"advance {key} {ready}")

    def complete(self, key: str, first_token: int) -> None:
        self.calls.append(f"complete {key} {first_token}")

    def fail(self, key: str, reason: str) -> None:
        self.calls.append(f"fail {key} {reason}")

    async def fetch(self, ticket: Ticket, blocks: list[int], held: int) -> Any:
        self.calls.append(f"fetch {ticket.request_id} {blocks} {held}")
        if self.stuck:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop(0)
        return SimpleNamespace(
            bytes=10, held_blocks=1, resumes=0, seconds=0.5, read_seconds=0.2, backend="ucx", transport="tcp",
            first_token=50,
        )  # fmt: skip

    async def discard(self, ticket: Ticket) -> None:
        self.calls.append(f"discard {ticket.request_id}")


class Prefill:
    """The prefill workers: answer with a new ticket."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], str, list[int]]] = []
        self.none_there = False

    async def ask(self, request: dict[str, Any], request_id: str, avoid: set[int]) -> dict[str, Any]:
        self.asked.append((request, request_id, sorted(avoid)))
        if self.none_there:
            raise AskAgainFailed("no prefill worker")
        number = len(self.asked) + 1
        ticket = make_ticket(f"r#{number}").to_wire()
        return {"disaggregated_params": {"kv_transfer_params": ticket, "prefill_instance": number}}


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
        self.registry = CollectorRegistry()
        self.jobs = Jobs("role", WorkerMetrics(self.registry), self.finished)
        self.prefill = Prefill()
        more = {"prefill": self.prefill, "attempts": 2} if kind is DecodeHandler else {"instance": lambda: 77}
        self.handler: Handler = kind(self.engine, self.agent, self.jobs, 100, 10, **more)
        self.context = Context()

    async def run(self, ticket: Ticket | None = None, **request: Any) -> list[dict[str, Any]]:
        data: dict[str, Any] = {"token_ids": PROMPT, **request}
        if ticket is not None:
            data["disaggregated_params"] = {"kv_transfer_params": ticket.to_wire(), "prefill_instance": 1}
        return [item async for item in self.handler.generate(data, self.context)]

    def record(self) -> dict[str, Any]:
        record = self.finished.get("r")
        assert record is not None
        return record


def test_prefill_gives_the_ticket_before_it_computes() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        bench.engine.gate = asyncio.Event()
        (item,) = await bench.run()
        parameters = item.pop("disaggregated_params")
        assert item == {"token_ids": []}
        assert Ticket.from_wire(parameters["kv_transfer_params"]).request_id == "r#1"
        assert parameters["prefill_instance"] == 77
        assert bench.agent.calls == ["export r#1 [4] 3 None [7]", "advance r#1 1"]
        assert bench.jobs.in_flight == 1
        bench.engine.gate.set()
        await bench.jobs.wait_idle()
        assert bench.agent.calls[-1] == "complete r#1 50"
        assert bench.record()["token_ids"] == [50]
        assert bench.engine.calls == ["prefill r#1"], "the blocks stay until the export is released"
        bench.agent.released("r#1", "read")
        assert bench.engine.calls[-1] == "release r#1"

    asyncio.run(scenario())


def test_a_prompt_that_fails_is_told_to_decode() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        bench.engine.broken = True
        assert len(await bench.run()) == 1
        await bench.jobs.wait_idle()
        assert bench.agent.calls[-1] == "fail r#1 EngineError: a step failed"
        assert bench.record()["outcome"] == "error"

    asyncio.run(scenario())


def test_an_export_that_is_released_early_ends_the_computation() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        bench.engine.gate = asyncio.Event()
        assert len(await bench.run()) == 1
        bench.agent.released("r#1", "peer_lost")
        assert bench.engine.calls[-1] == "release r#1"
        bench.engine.gate.set()
        await bench.jobs.wait_idle()
        assert "complete r#1 50" not in bench.agent.calls
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())


def test_prefill_of_a_client_that_left_is_not_exported() -> None:
    async def scenario() -> None:
        bench = Bench(PrefillHandler)
        bench.context.stopped.set()
        assert await bench.run() == []
        assert bench.engine.calls == ["prefill r#1", "cancel r#1"]
        assert not any(call.startswith("export") for call in bench.agent.calls)
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())


def test_decode_fetches_and_goes_on() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        items = await bench.run(make_ticket())
        assert items == [{"token_ids": [50]}, {"token_ids": [51, 52], "finish_reason": "length"}]
        assert bench.engine.calls == ["reserve r#1", "decode r#1"]
        assert bench.agent.calls == ["fetch r#1 [8, 9] 1"]
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
        assert [entry["event"] for entry in bench.agent.audit.recent()] == ["refused"] * (ticket is not None)

    asyncio.run(scenario())


def test_overload_lets_prefill_free_the_export() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.engine.overloaded = True
        with pytest.raises(Overloaded):
            await bench.run(make_ticket())
        assert bench.agent.calls == ["discard r#1"]

    asyncio.run(scenario())


def failure(code: str, verified: int = 0) -> TransferError:
    kinds: dict[str, TransferError] = {
        "peer_unreachable": PeerUnreachable("it went wrong"),
        "read_timeout": ReadTimeout("it went wrong"),
    }
    error = kinds.get(code, TransferError("it went wrong", code=code))
    error.verified_blocks = verified
    return error


def test_blocks_of_a_failed_fetch_wait_until_nothing_writes_into_them() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        error = failure("checksum", 1)
        error.quarantine = asyncio.get_running_loop().create_future()
        bench.agent.errors = [error]
        with pytest.raises(TransferError, match="went wrong"):
            await bench.run(make_ticket())
        await asyncio.sleep(0.01)
        assert bench.engine.calls == ["reserve r#1", "quarantine r#1 1"], "the client knows, the blocks wait"
        error.quarantine.set_result(None)
        await asyncio.sleep(0.01)
        assert bench.engine.calls[2:] == ["unreserve r#1 0"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "avoided"), [("peer_unreachable", [1]), ("read_timeout", [1]), ("prefill_failed", []), ("expired", [])]
)
def test_prefill_is_asked_again_when_kv_is_gone(code: str, avoided: list[int]) -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.errors = [failure(code, verified=2)]
        items = await bench.run(make_ticket(), stop_conditions={"max_tokens": 3, "ignore_eos": True})
        assert [item["token_ids"] for item in items] == [[50], [51, 52]], "the client sees nothing of it"
        asked = {"token_ids": PROMPT, "stop_conditions": {"max_tokens": 1, "ignore_eos": True}}
        assert bench.prefill.asked == [(asked, "r", avoided)]
        assert bench.agent.calls == ["fetch r#1 [8, 9] 1", "fetch r#2 [8, 9] 1"]
        assert bench.engine.calls == ["reserve r#1", "unreserve r#1 2", "reserve r#1/1", "decode r#1/1"]
        assert bench.registry.get_sample_value("pdstack_prefill_again_total", {"reason": code}) == 1

    asyncio.run(scenario())


def test_a_prefix_that_differs_is_forgotten_and_fetched() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.errors = [failure("prefix", verified=0)]
        assert len(await bench.run(make_ticket())) == 2
        assert bench.engine.calls[1:3] == ["forget [8]", "unreserve r#1 0"]

    asyncio.run(scenario())


def test_prefill_is_not_asked_for_ever() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.errors = [failure("peer_unreachable") for _ in range(3)]
        with pytest.raises(TransferError):
            await bench.run(make_ticket())
        assert [avoid for _, _, avoid in bench.prefill.asked] == [[1], [1, 2]]
        assert not any(call.startswith("decode") for call in bench.engine.calls)

    asyncio.run(scenario())


@pytest.mark.parametrize("code", ["checksum", "forged", "audience", "layout", "backend", "role", "replayed"])
def test_what_another_prefill_would_not_mend_fails_loudly(code: str) -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.errors = [failure(code)]
        with pytest.raises(TransferError):
            await bench.run(make_ticket())
        assert bench.prefill.asked == []

    asyncio.run(scenario())


def test_without_any_prefill_the_error_says_so() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.errors, bench.prefill.none_there = [failure("expired")], True
        with pytest.raises(AskAgainFailed, match="no prefill worker"):
            await bench.run(make_ticket())

    asyncio.run(scenario())


def test_decode_of_a_client_that_left_stops_the_engine() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.engine.gate = asyncio.Event()
        running = asyncio.create_task(bench.run(make_ticket()))
        while "decode r#1" not in bench.engine.calls:
            await asyncio.sleep(0.001)
        bench.context.stopped.set()
        assert await running == [{"token_ids": [50]}]
        assert bench.engine.calls == ["reserve r#1", "decode r#1", "cancel r#1"]
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())


def test_a_client_that_leaves_during_the_fetch_cuts_it_off() -> None:
    async def scenario() -> None:
        bench = Bench(DecodeHandler)
        bench.agent.stuck = True
        running = asyncio.create_task(bench.run(make_ticket()))
        while not bench.agent.calls:
            await asyncio.sleep(0.001)
        bench.context.stopped.set()
        assert await asyncio.wait_for(running, 5) == []
        assert bench.engine.calls == ["reserve r#1", "cancel r#1", "unreserve r#1 0"]
        assert bench.record()["outcome"] == "cancelled"

    asyncio.run(scenario())
