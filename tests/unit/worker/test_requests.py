from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import ask
from pdstack.worker.requests import BadRequest, engine_request, seed_of

# As the frontend of ai-dynamo 0.7.0.post1 sent it for a plain completion.
PLAIN: dict[str, Any] = {
    "model": "tiny",
    "token_ids": [100, 101, 102],
    "stop_conditions": {
        "max_tokens": 7,
        "stop": None,
        "stop_token_ids_hidden": [2],
        "min_tokens": None,
        "ignore_eos": None,
        "max_thinking_tokens": None,
    },
    "sampling_options": {
        "n": None,
        "best_of": None,
        "presence_penalty": None,
        "frequency_penalty": None,
        "repetition_penalty": None,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "use_beam_search": None,
        "length_penalty": None,
        "seed": None,
        "include_stop_str_in_output": None,
        "guided_decoding": None,
    },
    "output_options": {
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": None,
        "formatted_prompt": None,
    },
    "eos_token_ids": [2],
    "annotations": [],
}


def read(data: dict[str, Any], max_context: int = 100) -> Any:
    return engine_request("r#1", "r", data, max_context, 50)


def change(section: str, **values: Any) -> dict[str, Any]:
    return {**PLAIN, section: {**PLAIN[section], **values}}


def test_plain_request() -> None:
    request = read(PLAIN)
    assert request.request_id == "r#1"
    assert request.token_ids == [100, 101, 102]
    assert request.sampling.max_tokens == 7
    assert request.sampling.temperature == 1.0
    assert request.sampling.top_p == 1.0
    assert request.sampling.top_k == 0
    assert list(request.sampling.stop_token_ids) == [2]
    assert request.sampling.seed == seed_of("r")
    assert not request.sampling.ignore_eos


def test_everything_may_be_missing() -> None:
    request = read({"token_ids": [1]})
    assert request.sampling.max_tokens == 50
    assert list(request.sampling.stop_token_ids) == []


def test_options() -> None:
    options = change("sampling_options", temperature=0.0, top_p=0.5, top_k=3, seed=9, n=1, presence_penalty=0.0)
    sampling = read(options).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.5, 3, 9)
    assert read(change("sampling_options", top_k=-1)).sampling.top_k == 0


def test_ignore_eos_keeps_the_stop_tokens_that_the_client_named() -> None:
    data = change("stop_conditions", ignore_eos=True, stop_token_ids=[5], min_tokens=7)
    sampling = read(data).sampling
    assert sampling.ignore_eos
    assert list(sampling.stop_token_ids) == [5]
    assert sampling.min_tokens == 7


def test_the_seed_follows_the_request_and_not_the_attempt() -> None:
    assert seed_of("a") == seed_of("a") != seed_of("b")
    assert 0 <= seed_of("a") < 2**63


def test_max_tokens_is_cut_to_the_context() -> None:
    assert read(change("stop_conditions", max_tokens=1000)).sampling.max_tokens == 97
    assert read(change("stop_conditions", max_tokens=None)).sampling.max_tokens == 50
    assert read({"token_ids": [1] * 99}).sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"token_ids": []}, "no tokens"),
        ({}, "no tokens"),
        ({"token_ids": [1] * 100}, "the prompt has 100 tokens, this worker serves 100 including at least one"),
        (change("stop_conditions", max_tokens=0), "max_tokens: found 0, wanted at least 1"),
        (change("sampling_options", n=2), "n: found 2, this engine does not have it"),
        (change("sampling_options", repetition_penalty=1.1), "repetition_penalty: found 1.1"),
        (change("sampling_options", guided_decoding={"json": {}}), "guided_decoding"),
        (change("output_options", logprobs=0), "logprobs"),
        (change("sampling_options", temperature=-1), "temperature: found -1.0"),
    ],
)
def test_what_cannot_be_served_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(data)


def test_a_request_can_do_without_the_prefix_cache() -> None:
    assert engine_request("k", "r", PLAIN, 100, 10).reuse
    assert not engine_request("k", "r", {**PLAIN, "annotations": [ask.NO_PREFIX_CACHE]}, 100, 10).reuse
