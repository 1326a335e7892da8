"""What happens when a part ends, dies or is missing, and what an HTTP client sees of it.

The texts that clients see are asserted here because docs/failures.md quotes them.
"""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.integration.conftest import MakeStack
from tests.integration.processes import Coordination, Stack, wait_for
from tests.integration.test_serving import prompt, tokens

LONG = 900


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def two_decodes(make_stack: MakeStack, **changes: Any) -> Stack:
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    stack.start_worker("prefill-0", "prefill", wait=False)
    stack.start_worker("decode-0", "decode", wait=False, **changes)
    stack.start_worker("decode-1", "decode", **changes)
    for worker in stack.workers.values():
        wait_for(f"{worker.name} is ready", worker.ready)
    stack.wait_serving()
    return stack


def busy(stack: Stack) -> str:
    """The name of the decode worker that serves a request now."""

    def alone() -> list[str]:
        decodes = [worker for worker in stack.workers.values() if worker.role == "decode"]
        names = [worker.name for worker in decodes if worker.metrics()["pdstack_requests_in_flight"]]
        return names if len(names) == 1 else []

    # The request before this one may still be ending.
    return str(wait_for("one decode worker is busy", alone)[0])


def test_decode_killed_the_stream_goes_on_elsewhere(make_stack: MakeStack) -> None:
    stack = two_decodes(make_stack)
    undisturbed = list(stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True))
    assert undisturbed[-1] == "data: [DONE]"
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    seen = [next(lines) for _ in range(20)]
    stack.workers[busy(stack)].program.kill()
    seen += list(lines)
    assert seen[-1] == "data: [DONE]"
    assert text_of(seen) == text_of(undisturbed)


def test_last_decode_killed_then_restarted(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    prefill = stack.start_worker("prefill-0", "prefill", wait=False)
    decode = stack.start_worker("decode-0", "decode")
    stack.wait_serving()
    expected = tokens(stack, stack.complete(prompt(64), max_tokens=8, ignore_eos=True))
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    seen = [next(lines) for _ in range(20)]
    decode.program.kill()
    seen += list(lines)
    print("client of a killed decode worker saw:", seen[-3:])
    assert "event: error" in seen, "a client must be able to tell that the answer is not whole"
    stack.start_worker("decode-0", "decode")
    stack.wait_serving()
    assert tokens(stack, stack.complete(prompt(64), max_tokens=8, ignore_eos=True)) == expected
    # The frontend tried to go on with a new prefill, whose ticket nobody could take up: it is void after its deadline.
    wait_for("prefill holds nothing", lambda: prefill.used_blocks() == 0, 30.0)


def test_prefill_killed_then_restarted(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    prefill = stack.start_worker("prefill-0", "prefill", wait=False)
    stack.start_worker("decode-0", "decode")
    stack.wait_serving()
    expected = tokens(stack, stack.complete(prompt(64), max_tokens=8, ignore_eos=True))
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    next(lines)
    prefill.program.kill()
    assert list(lines)[-1] == "data: [DONE]", "a stream that has its KV does not need prefill any more"
    started = time.monotonic()
    answer = stack.complete(prompt(64), max_tokens=8)
    print(f"client without prefill saw after {time.monotonic() - started:.1f} s:", answer.status, answer.text)
    assert answer.status == 500
    stack.start_worker("prefill-0", "prefill")
    stack.wait_serving()
    assert tokens(stack, stack.complete(prompt(64), max_tokens=8, ignore_eos=True)) == expected


def test_stopped_decode_finishes_its_streams(make_stack: MakeStack) -> None:
    stack = two_decodes(make_stack)
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    seen = [next(lines) for _ in range(5)]
    leaving = stack.workers[busy(stack)]
    leaving.program.send(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, lines)
        answers = [stack.complete(prompt(20), max_tokens=4).status for _ in range(10)]
        seen += rest.result()
    assert seen[-1] == "data: [DONE]"
    assert leaving.program.wait() == 0
    print("requests while a decode worker drained:", answers)
    assert set(answers) == {200}


def test_draining_is_bounded(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    stack.start_worker("prefill-0", "prefill", wait=False)
    decode = stack.start_worker("decode-0", "decode", drain_timeout_s=0.1, migration_limit=0)
    stack.wait_serving()
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    seen = [next(lines) for _ in range(5)]
    decode.program.send(signal.SIGTERM)
    seen += list(lines)
    assert decode.program.wait() == 0
    assert "are still in flight: cut" in decode.program.text()
    assert seen[-3:] == ["event: error", ": Stream ended before generation completed", "data: [DONE]"]


def test_what_is_cut_by_the_end_of_draining_goes_on_elsewhere(make_stack: MakeStack) -> None:
    stack = two_decodes(make_stack, drain_timeout_s=0.1)
    undisturbed = list(stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True))
    lines = stack.stream(prompt(64), max_tokens=LONG, ignore_eos=True)
    seen = [next(lines) for _ in range(5)]
    leaving = stack.workers[busy(stack)]
    leaving.program.send(signal.SIGTERM)
    seen += list(lines)
    assert leaving.program.wait() == 0
    assert "are still in flight: cut" in leaving.program.text()
    assert text_of(seen) == text_of(undisturbed)


def test_stopped_prefill_leaves_cleanly(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    first = stack.start_worker("prefill-0", "prefill", wait=False)
    second = stack.start_worker("prefill-1", "prefill", wait=False)
    stack.start_worker("decode-0", "decode")
    wait_for("prefill-0 is ready", first.ready)
    wait_for("prefill-1 is ready", second.ready)
    stack.wait_serving()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stack.complete, prompt(200, salt), max_tokens=20) for salt in range(12)]
        first.program.send(signal.SIGTERM)
        statuses = [future.result().status for future in running]
    print("requests while a prefill worker drained:", statuses)
    assert first.program.wait() == 0
    assert stack.complete(prompt(20), max_tokens=4).status == 200


def test_worker_waits_for_coordination_and_registers_again_when_its_lease_is_lost(
    own_coordination: Coordination, make_stack: MakeStack
) -> None:
    stack = make_stack(coordination=own_coordination)
    worker = stack.start_worker("prefill-0", "prefill", wait=False)
    wait_for("the worker says what it waits for", lambda: "etcd does not answer" in str(worker.health()[1]))
    assert worker.health()[0] == 503
    own_coordination.start()
    wait_for("the worker is ready", worker.ready)
    own_coordination.programs["etcd"].kill()
    wait_for("the worker misses etcd", lambda: worker.health()[0] == 503, 60.0)
    own_coordination.start("etcd")
    wait_for("the worker is ready again", worker.ready, 60.0)
    assert worker.metrics()["pdstack_registrations_lost_total"] == 1


def test_stopped_while_waiting_for_coordination(own_coordination: Coordination, make_stack: MakeStack) -> None:
    worker = make_stack(coordination=own_coordination).start_worker("decode-0", "decode", wait=False)
    wait_for("the worker waits", lambda: worker.health()[0] == 503)
    assert worker.program.stop() == 0
