"""Kill each container's process under load: it comes back by itself, and no client ever gets a wrong token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

STREAMS = 6
IN_A_ROW = 20
RECOVERY_S = 90
# How long the load goes on after the first recovery. What etcd's death does to the others shows late: a lease is missed
# up to 10 s after the last keep-alive.
SETTLE_S = {"etcd": 25}
SETTLE_ELSE_S = 6


@pytest.mark.parametrize("service", ["decode-0", "prefill-0", "nats", "etcd", "frontend"])
def test_a_killed_service_comes_back_and_no_token_is_wrong(
    stack: Any, load: Callable[[int], Any], wait_until: Callable[..., Any], service: str
) -> None:
    with load(STREAMS) as running:
        assert running.wait(lambda so_far: so_far.counts()["ok"] >= 2 * STREAMS, 60), running.counts()
        killed = time.monotonic()
        pid = stack.kill(service)
        running.wait(lambda so_far: so_far.recovered(killed, IN_A_ROW) is not None, RECOVERY_S)
        running.wait(lambda _: False, SETTLE_S.get(service, SETTLE_ELSE_S))
        settled = time.monotonic()
        recovered = running.wait(lambda so_far: so_far.recovered(settled, IN_A_ROW) is not None, RECOVERY_S)
    bad = [outcome for outcome in running.outcomes if outcome.kind != "ok" and outcome.ended >= killed]
    seen = dict(running.counts(since=killed))
    examples = {outcome.answer.error[:160] for outcome in bad}
    stack.report[f"kill {service}"] = {
        "last_failure_s": round(max((outcome.ended for outcome in bad), default=killed) - killed, 1),
        "answers": seen,
        "errors": sorted(examples)[:4],
    }
    wrong = [outcome for outcome in running.outcomes if outcome.kind == "wrong"]
    assert not wrong, f"prompt {wrong[0].prompt}: {wrong[0].answer.text!r}, wanted {running.wanted[wrong[0].prompt]!r}"
    assert recovered, f"not back {RECOVERY_S} s after it settled: {seen} {examples}"
    state = stack.inspect()[service]["State"]
    assert state["Running"]
    assert state["Pid"] != pid

    def all_can_serve() -> bool:
        return all(stack.metric(w["name"], "pdstack_requests_in_flight") == 0 for w in stack.topology["workers"])

    wait_until("no request is in flight", all_can_serve, 60)
