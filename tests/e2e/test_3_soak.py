"""64 streams side by side: no error, no wrong token, and nothing is held when they end.

PDSTACK_E2E_SOAK_S sets how long (60 s; the release figure is made with 300).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

STREAMS = 64
SOAK_S = float(os.environ.get("PDSTACK_E2E_SOAK_S", "60"))
HELD = (
    "pdstack_engine_used_blocks",
    "pdstack_requests_in_flight",
    "pdstack_kv_exports",
    "pdstack_kv_quarantined_blocks",
)


def test_64_streams_without_an_error(stack: Any, load: Callable[[int], Any], wait_until: Callable[..., Any]) -> None:
    with load(STREAMS) as running:
        running.wait(lambda so_far: so_far.counts().keys() - {"ok"}, SOAK_S)
    counts = running.counts()
    took = max(outcome.ended for outcome in running.outcomes) - min(outcome.sent for outcome in running.outcomes)
    bad = [outcome for outcome in running.outcomes if outcome.kind != "ok"]
    assert not bad, f"{counts}: {bad[0].answer.problem()}"
    first = sorted(outcome.answer.first_s for outcome in running.outcomes)
    stack.report["soak"] = {
        "streams": STREAMS,
        "seconds": round(took, 1),
        "answers": counts["ok"],
        "answers_per_s": round(counts["ok"] / took, 1),
        "ttft_p50_s": round(first[len(first) // 2], 3),
    }
    assert counts["ok"] >= STREAMS


def test_the_pools_are_empty_afterwards(stack: Any, wait_until: Callable[..., Any]) -> None:
    def held() -> dict[str, float]:
        found = {
            f"{worker['name']} {name}": stack.metric(worker["name"], name)
            for worker in stack.topology["workers"]
            for name in HELD
        }
        return {key: value for key, value in found.items() if value}

    started = time.monotonic()
    stack.report["held_at_the_end"] = held()
    wait_until("nothing is held by any worker", lambda: not held() or None, 30)
    stack.report["pools_empty_after_s"] = round(time.monotonic() - started, 1)
