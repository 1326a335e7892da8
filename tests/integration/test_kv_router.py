"""With --router-mode kv the frontend sends a prompt to the prefill worker that has its beginning in cache."""

from __future__ import annotations

from tests.integration.conftest import MakeStack
from tests.integration.processes import wait_for
from tests.integration.test_serving import prompt


def test_router_knows_what_is_cached(make_stack: MakeStack) -> None:
    stack = make_stack()
    frontend = stack.start_frontend("--enforce-disagg", "--router-mode", "kv", "--kv-cache-block-size", "16")
    for name in ("prefill-0", "prefill-1"):
        stack.start_worker(name, "prefill", wait=False)
    stack.start_worker("decode-0", "decode")
    prefills = [stack.workers[name] for name in ("prefill-0", "prefill-1")]
    for worker in prefills:
        wait_for(f"{worker.name} is ready", worker.ready)
    stack.wait_serving()

    def cached(salt: int) -> int:
        answer = stack.complete(prompt(160, salt), max_tokens=2)
        assert answer.status == 200, answer.text
        found = [record for worker in prefills if (record := worker.finished(answer.request_id))]
        assert len(found) == 1
        return int(found[0]["cached_tokens"])

    def reported() -> bool:
        return "cached blocks: 9" in frontend.text() or "cached blocks: 10" in frontend.text()

    for salt in range(4):
        assert cached(salt) == 0
    wait_for("the router's index has the blocks", lambda: [cached(s) for s in range(4)] and reported())
    # Two workers and round-robin would miss half of the time.
    assert all(cached(salt) >= 144 for salt in (3, 1, 0, 2, 0, 3))
