"""A frontend's health check against a real frontend and etcd, and the wait for leases after a member's restart."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from tests.integration.conftest import MakeStack
from tests.integration.processes import Coordination, Stack, wait_for

from pdstack.deploy import frontend_check, prove


def ask(stack: Stack, state: Path, now: float = 0.0) -> tuple[str, bool]:
    endpoints = ["http://127.0.0.1:9", stack.coordination.etcd_url]
    return frontend_check.check(stack.url, "tiny", stack.namespace, endpoints, now=now, state=state)


def card(stack: Stack, component: str) -> str:
    return base64.b64encode(f"v1/mdc/{stack.namespace}/{component}/generate/1".encode()).decode()


def put(stack: Stack, component: str) -> None:
    """Register a worker of which this frontend learns nothing: it cannot read such a card."""
    value = base64.b64encode(b"not a card").decode()
    prove.etcd_call(stack.coordination.etcd_url, "kv/put", {"key": card(stack, component), "value": value})


def test_a_frontend_is_well_while_it_takes_requests_for_the_model(make_stack: MakeStack, tmp_path: Path) -> None:
    state = tmp_path / "missed"
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    wait_for("the frontend answers", lambda: "lists no model" in ask(stack, state)[0])
    assert "etcd has no card of a decode worker" in ask(stack, state, now=1000.0)[0]
    stack.start_worker("prefill-0", "prefill")
    wait_for("prefill is listed", lambda: "/v1/completions answers 503" in ask(stack, state)[0])
    wrong, again = ask(stack, state, now=1000.0)
    assert "etcd has no card of a decode worker" in wrong
    assert not again
    stack.start_worker("decode-0", "decode")
    stack.wait_serving()
    assert ask(stack, state) == ("", False)
    assert frontend_check.cards([stack.coordination.etcd_url], stack.namespace) != []


def test_a_frontend_that_missed_a_worker_is_started_again(make_stack: MakeStack, tmp_path: Path) -> None:
    state = tmp_path / "missed"
    stack = make_stack()
    stack.start_frontend("--enforce-disagg")
    put(stack, "prefill")
    wait_for("the frontend answers", lambda: "no card of a decode worker" in ask(stack, state)[0])
    put(stack, "backend")
    wrong, again = ask(stack, state, now=10.0)
    assert "etcd has the card of 1 worker(s), unseen by this frontend for 0 s" in wrong
    assert not again
    assert not ask(stack, state, now=10.0 + frontend_check.STALE_S)[1]
    wrong, again = ask(stack, state, now=11.0 + frontend_check.STALE_S)
    assert "unseen by this frontend for 41 s" in wrong
    assert again
    prove.etcd_call(stack.coordination.etcd_url, "kv/deleterange", {"key": card(stack, "backend")})
    assert not ask(stack, state, now=90.0)[1], "a worker that is gone was not missed"
    assert not state.exists()


def test_a_frontend_is_not_blamed_for_etcd(
    make_stack: MakeStack, own_coordination: Coordination, tmp_path: Path
) -> None:
    state = tmp_path / "missed"
    own_coordination.start()
    stack = make_stack(coordination=own_coordination)
    stack.start_frontend("--enforce-disagg")
    put(stack, "backend")
    wait_for("the frontend answers", lambda: "card of 1 worker(s)" in ask(stack, state)[0])
    own_coordination.programs["etcd"].kill()
    wrong, again = ask(stack, state, now=1000.0)
    assert "etcd: " in wrong
    assert not again
    assert not state.exists()


def test_leases_are_waited_for(own_coordination: Coordination, make_stack: MakeStack) -> None:
    own_coordination.start()
    url = own_coordination.etcd_url
    assert prove.settle([url], 5.0).startswith("etcd: 0 of 0 leases")
    prove.etcd_call(url, "lease/grant", {"TTL": 2})
    assert "0 of 1 leases were renewed, 1 ran out" in prove.settle([url], 15.0)
    prove.etcd_call(url, "lease/grant", {"TTL": 600})
    assert "1 not renewed yet" in prove.settle([url], 1.0)
    make_stack(coordination=own_coordination).start_worker("prefill-0", "prefill")
    assert "1 of 2 leases were renewed, 0 ran out" in prove.settle([url], 8.0)


@pytest.mark.parametrize("arguments", [[], ["http://127.0.0.1:9", "m", "n"]])
def test_the_check_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert frontend_check.main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_a_frontend_that_does_not_answer_is_not_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert frontend_check.main(["http://127.0.0.1:9", "m", "n", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err
