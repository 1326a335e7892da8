"""What a client gets from a disaggregated deployment that is well, over both backends."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Completion, Stack, get, wait_for

# Around the edges of blocks (16) and of prefill chunks (128).
LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 400, 900)


def prompt(length: int, salt: int = 0) -> list[int]:
    """A prompt of so many tokens that starts differently for every salt."""
    return [3 + (7 * salt + 31 * at + at * at) % 300 for at in range(length)]


def tokens(stack: Stack, answer: Completion) -> list[int]:
    """The tokens of an answer, as the worker that gave them remembers."""
    assert answer.status == 200, answer.text
    for worker in stack.workers.values():
        record = worker.finished(answer.request_id)
        if record is not None and worker.role != "prefill":
            assert record["outcome"] == "ok"
            return list(record["token_ids"])
    raise AssertionError(f"no worker remembers {answer.request_id}")


def nothing_in_flight(stack: Stack) -> bool:
    return all(worker.metrics()["pdstack_requests_in_flight"] == 0 for worker in stack.workers.values())


def pools_are_empty(stack: Stack) -> bool:
    return all(worker.used_blocks() == 0 for worker in stack.workers.values())


def call(stack: Stack, component: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call a worker without the frontend."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("direct_call.py")), stack.namespace, component],
        input=json.dumps(request),
        env=stack.program_env(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return dict(json.loads(done.stdout))


def test_chat_is_streamed(stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 8, "ignore_eos": True}
    response = stack.post("/v1/chat/completions", body)
    assert response.status == 200
    lines = [line.decode().strip() for line in response if line.strip()]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(chunks) >= 3, "the answer comes in pieces"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_tokens_equal_the_aggregated_ones(stack: Stack, aggregated: Stack) -> None:
    before = stack.workers["decode-0"].metrics()
    for salt, length in enumerate(LENGTHS):
        # No prompt begins like another, so that every block has to move.
        text = prompt(length, 40 + salt)
        options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
        here = tokens(stack, stack.complete(text, **options))
        there = tokens(aggregated, aggregated.complete(text, **options))
        assert len(here) == 24
        assert here == there, f"prompt of {length} tokens"
    moved = bytes_moved(stack.workers["decode-0"].metrics(), stack.backend) - bytes_moved(before, stack.backend)
    blocks = sum(-(-length // 16) for length in LENGTHS)
    assert moved == blocks * block_bytes(stack)


def test_what_decode_holds_already_does_not_move(stack: Stack, aggregated: Stack) -> None:
    decode = stack.workers["decode-0"]
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    first = prompt(200, 77)
    answer = tokens(stack, stack.complete(first, **options))
    before = decode.metrics()
    follow_up = [*first, *answer, *prompt(30, 78)]
    answer = tokens(stack, stack.complete(follow_up, **options))
    after = decode.metrics()
    assert answer == tokens(aggregated, aggregated.complete(follow_up, **options))
    # 239 tokens of the first round have KV: 14 full blocks. The follow-up has 270 tokens: 17 blocks.
    assert bytes_moved(after, stack.backend) - bytes_moved(before, stack.backend) == 3 * block_bytes(stack)
    records = get(decode.status_url + "/audit")[1]
    assert records[-1]["held"] == 14
    assert records[-1]["verdict"] == "ok"
    # A check that wants to see all of it moved can have that.
    without = {"nvext": {"annotations": ["pdstack:no-prefix-cache"]}}
    assert tokens(stack, stack.complete(follow_up, **options, **without)) == answer
    assert bytes_moved(decode.metrics(), stack.backend) - bytes_moved(after, stack.backend) == 17 * block_bytes(stack)


def block_bytes(stack: Stack) -> int:
    """Keys and values of 16 tokens in all layers, in 32-bit floats."""
    model = json.loads((stack.model_path / "config.json").read_text())
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    return int(16 * 2 * 4 * model["num_hidden_layers"] * model["num_key_value_heads"] * head_dim)


def bytes_moved(metrics: dict[str, float], backend: str) -> float:
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith("pdstack_kv_bytes_total{") and f'backend="{backend}"' in name
    )


def test_seeded_sampling_equals_the_aggregated_one(stack: Stack, aggregated: Stack) -> None:
    options: dict[str, Any] = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.95, "seed": 11, "ignore_eos": True}
    here = tokens(stack, stack.complete(prompt(50), **options))
    assert here == tokens(aggregated, aggregated.complete(prompt(50), **options))
    assert here != tokens(stack, stack.complete(prompt(50), **{**options, "seed": 12}))


def test_concurrent_requests_do_not_disturb_each_other(stack: Stack, aggregated: Stack) -> None:
    prompts = [prompt(30 + 40 * number, salt=number) for number in range(8)]

    def run(stack: Stack, text: list[int]) -> list[int]:
        return tokens(stack, stack.complete(text, max_tokens=40, ignore_eos=True))

    with ThreadPoolExecutor(8) as pool:
        here = list(pool.map(lambda text: run(stack, text), prompts))
    assert here == [run(aggregated, text) for text in prompts]
    wait_for("all blocks are free", lambda: pools_are_empty(stack))


def test_client_that_leaves_frees_its_blocks(stack: Stack) -> None:
    lines = stack.stream(prompt(300, salt=99), max_tokens=700, ignore_eos=True)
    for _ in range(3):
        next(lines)
    assert stack.workers["decode-0"].used_blocks() > 0
    before = stack.workers["decode-0"].metrics().get('pdstack_requests_total{outcome="cancelled"}', 0)
    lines.close()
    wait_for("all blocks are free", lambda: pools_are_empty(stack), 20.0)
    # The blocks are free a moment before the request has ended.
    wait_for("no request is in flight", lambda: nothing_in_flight(stack))
    metrics = stack.workers["decode-0"].metrics()
    assert metrics['pdstack_requests_total{outcome="cancelled"}'] == before + 1


def test_many_clients_that_leave_at_any_moment(stack: Stack) -> None:
    def visit(number: int) -> None:
        text = prompt(20 + 13 * number, salt=number)
        if number % 3 == 0:
            # Before there is an answer: while it waits, during prefill, or between prefill and decode.
            stack.send_and_leave({"prompt": text, "max_tokens": 200, "stream": True}, number * 0.002)
            return
        lines = stack.stream(text, max_tokens=200, ignore_eos=True)
        for _ in range(number % 7 + 1):
            next(lines)
        lines.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(visit, range(60)))
    wait_for("all blocks are free", lambda: pools_are_empty(stack), 30.0)
    wait_for("no request is in flight", lambda: nothing_in_flight(stack))
    assert tokens(stack, stack.complete(prompt(5), max_tokens=3, ignore_eos=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": prompt(1024)}, "context limit: the prompt has 1024 tokens, this worker serves 1024"),
        ({"prompt": prompt(5), "presence_penalty": 1.0}, "presence_penalty: found 1.0"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(stack: Stack, options: dict[str, Any], message: str) -> None:
    answer = stack.complete(**options)
    assert answer.status == 500
    assert message in answer.body["message"]
    assert "stack backtrace" not in answer.text.lower()
    assert pools_are_empty(stack)


def test_max_tokens_is_cut_to_the_context(stack: Stack) -> None:
    answer = stack.complete(prompt(1000), max_tokens=500, ignore_eos=True)
    assert len(tokens(stack, answer)) == 24
    assert answer.body["choices"][0]["finish_reason"] == "length"


def test_decode_refuses_a_request_without_ticket(stack: Stack) -> None:
    answer = call(stack, "backend", {"request_id": "r1", "token_ids": prompt(20)})
    assert answer["items"] == []
    assert "carries no ticket" in answer["error"]


def test_decode_refuses_forged_and_used_tickets(stack: Stack) -> None:
    text = prompt(20, salt=5)
    common = {"token_ids": text, "stop_conditions": {"max_tokens": 4, "ignore_eos": True}}
    given = call(stack, "prefill", {"request_id": "r2", **common})["items"][0]["disaggregated_params"]
    ticket = given["kv_transfer_params"]
    cases = {
        "is not signed": {**ticket, "blocks": [block + 1 for block in ticket["blocks"]]},
        "is for request": {**ticket, "request_id": "other#1"},
        "covers 21 tokens": {**ticket, "tokens": 21},
        "is not a KV ticket": {"hello": "world", "version": 2},
    }
    for message, forged in cases.items():
        params = {"kv_transfer_params": forged}
        answer = call(stack, "backend", {"request_id": "r2", **common, "disaggregated_params": params})
        assert answer["items"] == [], message
        assert message in str(answer["error"]), answer
    good = call(stack, "backend", {"request_id": "r2", **common, "disaggregated_params": given})
    assert sum(len(item["token_ids"]) for item in good["items"]) == 4, good
    used = call(stack, "backend", {"request_id": "r2", **common, "disaggregated_params": given})
    assert used["items"] == []
    assert used["error"]
    wait_for("all blocks are free", lambda: pools_are_empty(stack))


def test_status_pages(stack: Stack) -> None:
    for worker in stack.workers.values():
        status, health = worker.health()
        assert status == 200, health
        assert health["role"] == worker.role
        assert worker.transfer()["backend"] == stack.backend
        assert worker.finished("no-such-request") is None
        metrics = worker.metrics()
        assert metrics["pdstack_time_to_first_token_seconds_count"] > 0
