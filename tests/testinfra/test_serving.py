"""The frontend serves the model as a client sees it."""

from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import ask


def test_the_model_is_listed(deployment: dict[str, Any], topology: dict[str, Any]) -> None:
    assert topology["frontends"]
    for frontend in topology["frontends"]:
        models = ask.get_json(f"{frontend['url']}/v1/models")["data"]
        assert deployment["model"]["name"] in [model["id"] for model in models], models


def test_a_chat_is_streamed_to_its_end(deployment: dict[str, Any], topology: dict[str, Any]) -> None:
    for frontend in topology["frontends"]:
        answer = ask.chat(frontend["url"], deployment["model"]["name"], "Say something about the sea.", 12)
        assert answer.good, answer.problem()
        assert answer.finish_reason in ("stop", "length")
        assert answer.done
        if answer.finish_reason == "length":
            # A token may be half a character, which is held back until it is whole; but 12 tokens are not one piece.
            assert len(answer.pieces) > 1, f"found one piece {answer.text!r}, wanted a stream"


@pytest.mark.engine("reference")
def test_every_worker_can_serve(topology: dict[str, Any]) -> None:
    assert {worker["role"] for worker in topology["workers"]} == {"prefill", "decode"}
    for worker in topology["workers"]:
        health = ask.get_json(f"{worker['status_url']}/health")
        assert health["status"] == "ready"
        assert (health["name"], health["role"]) == (worker["name"], worker["role"])


@pytest.mark.engine("reference")
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(
    deployment: dict[str, Any], topology: dict[str, Any]
) -> None:
    context = deployment["engine_settings"]["max_context"]
    frontend = topology["frontends"][0]["url"]
    answer = ask.complete(frontend, deployment["model"]["name"], [1] * (context + 1), 4)
    assert not answer.good
    assert str(context) in answer.error, answer.problem()
