"""A prefill worker dies or freezes while it computes or is read: the client gets a slower answer, and the right one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.integration.conftest import MakeStack
from tests.integration.processes import Stack, Worker, wait_for
from tests.integration.test_serving import pools_are_empty, prompt

from pdstack.engine import Engine, EngineConfig, Request, SamplingParams

# Long enough to be met in the middle of its prefill.
LONG = 4000
ENGINE = {"max_context": 4096, "kv_blocks": 600, "prefill_chunk": 64}
OPTIONS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
# A frozen worker is found by its silence.
QUICK = {"transfer": {"heartbeat_s": 0.3, "resume_s": 0.5}}


@pytest.fixture(scope="module")
def alone(model_path: Path) -> Iterator[Engine]:
    """An engine that answers undivided: what is right."""
    engine = Engine.load(model_path, EngineConfig(max_context=4096, kv_blocks=600))
    engine.start()
    yield engine
    engine.stop()


def right(alone: Engine, text: list[int]) -> list[int]:
    async def run() -> list[int]:
        request = Request("r", text, SamplingParams(max_tokens=12, ignore_eos=True))
        return [token async for step in alone.generate(request) for token in step.token_ids]

    return asyncio.run(run())


def several(make_stack: MakeStack, prefills: int) -> Stack:
    stack = make_stack()
    stack.engine = ENGINE
    stack.start_frontend("--enforce-disagg")
    for number in range(prefills):
        stack.start_worker(f"prefill-{number}", "prefill", wait=False, **QUICK)
    stack.start_worker("decode-0", "decode", **QUICK)
    for worker in stack.workers.values():
        wait_for(f"{worker.name} is ready", worker.ready)
    stack.wait_serving()
    wait_for("nothing is held", lambda: pools_are_empty(stack))
    return stack


def computing(stack: Stack) -> Worker:
    """The prefill worker that is in the middle of a prompt which decode is already fetching."""

    def found() -> list[Worker]:
        workers = [worker for worker in stack.workers.values() if worker.role == "prefill"]
        return [
            worker
            for worker in workers
            if worker.transfer()["exports"]["granted"] and worker.metrics()["pdstack_engine_prefilling"]
        ]

    return wait_for("a prompt is being computed and fetched", found)[0]  # type: ignore[no-any-return]  # a Worker


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_prefill_takes_over(make_stack: MakeStack, alone: Engine, number: signal.Signals) -> None:
    stack = several(make_stack, 2)
    text = prompt(LONG, 5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.complete, text, **OPTIONS)
        victim = computing(stack)
        victim.program.send(number)
        assert not answer.done()
        found = tokens_of_decode(stack, answer.result())
    victim.program.kill()
    del stack.workers[victim.name]
    assert found == right(alone, text)
    decode = stack.workers["decode-0"]
    assert sum(decode.metrics()[name] for name in decode.metrics() if "prefill_again_total" in name) == 1
    assert "asking prefill again, 1 of 3" in decode.program.text()
    wait_for("nothing is held", lambda: pools_are_empty(stack))


def test_a_prefill_that_comes_back_takes_over(make_stack: MakeStack, alone: Engine) -> None:
    stack = several(make_stack, 1)
    text = prompt(LONG, 6)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.complete, text, **OPTIONS)
        computing(stack).program.kill()
        stack.start_worker("prefill-0", "prefill", **QUICK)
        found = tokens_of_decode(stack, answer.result())
    assert found == right(alone, text)


def test_a_client_that_leaves_stops_the_computation(make_stack: MakeStack) -> None:
    stack = several(make_stack, 1)
    before = stack.workers["prefill-0"].metrics()
    body = {"prompt": prompt(LONG, 7), "max_tokens": 12, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        visit = pool.submit(stack.send_and_leave, body, 0.3)
        computing(stack)
        visit.result()
    wait_for("nothing is held", lambda: pools_are_empty(stack))
    after = stack.workers["prefill-0"].metrics()
    name = "pdstack_engine_prompt_tokens"
    assert after[name] == before[name], "the prompt was not computed to its end"
    assert after["pdstack_requests_in_flight"] == 0


def tokens_of_decode(stack: Stack, answer: Any) -> list[int]:
    """As `tokens`, where prefill workers may be gone."""
    assert answer.status == 200, answer.text
    record = stack.workers["decode-0"].finished(answer.request_id)
    assert record is not None
    return list(record["token_ids"])
