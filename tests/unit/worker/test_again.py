"""Which losses make decode ask prefill again, how often, and whom it then avoids."""

from __future__ import annotations

import pytest

from pdstack.transfer import (
    AuthenticationFailed,
    ChecksumMismatch,
    PathUnavailable,
    PeerUnreachable,
    ReadFailed,
    ReadTimeout,
    Refused,
    TransferError,
)
from pdstack.worker.again import Attempts, prefill_request

# Whatever the path calls it: cma says that the process is gone, a stream that it was cut off.
LOST = [
    PeerUnreachable("x"),
    ReadFailed("x"),
    ReadFailed("x", code="peer_gone"),
    ReadFailed("x", code="protocol"),
    ReadTimeout("x"),
    Refused("x", code="incarnation"),
    TransferError("x", code="prefill_stalled"),
]
GONE = [Refused("x", code="expired"), Refused("x", code="lost"), ChecksumMismatch("x", code="prefix")]
LOUD = [
    ChecksumMismatch("x"),
    ReadFailed("x", code="checksum"),
    ReadFailed("x", code="not_permitted"),
    PathUnavailable("x"),
    AuthenticationFailed("x"),
    Refused("x", code="replayed"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: f"{type(error).__name__}-{error.code}")
def test_a_lost_worker_is_avoided(error: TransferError) -> None:
    attempts = Attempts(2)
    assert attempts.another(error, 7)
    assert attempts.another(error, None)
    assert not attempts.another(error, 8), "there is a limit"
    assert (attempts.made, attempts.avoid) == (2, {7})


@pytest.mark.parametrize("error", GONE, ids=lambda error: error.code)
def test_a_worker_that_only_has_it_no_more_may_be_asked_again(error: TransferError) -> None:
    attempts = Attempts(1)
    assert attempts.another(error, 7)
    assert not attempts.avoid


@pytest.mark.parametrize("error", LOUD, ids=lambda error: f"{type(error).__name__}-{error.code}")
def test_what_is_wrong_and_not_lost_fails_the_request(error: TransferError) -> None:
    assert not Attempts(3).another(error, 7)


def test_prefill_is_asked_for_one_token_and_gets_no_ticket() -> None:
    request = {"token_ids": [1], "disaggregated_params": {"a": 1}, "stop_conditions": {"max_tokens": 9, "stop": ["x"]}}
    asked = prefill_request(request, "disaggregated_params")
    assert asked == {"token_ids": [1], "stop_conditions": {"max_tokens": 1, "stop": ["x"]}}
    assert request["stop_conditions"]["max_tokens"] == 9
