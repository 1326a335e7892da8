"""Turn what Dynamo's frontend sends (a dict, already tokenised) into an engine request.

Facts about the dict were observed with ai-dynamo 0.7.0: any section may be missing or null, and the frontend enforces
neither the context limit nor the options that an engine supports. With `ignore_eos` it clears the stop tokens and sets
`min_tokens` to `max_tokens`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pdstack.engine import Request, SamplingParams

# Options that change the output and that this engine does not have, with the values that mean "off".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "use_beam_search": (False,),
    "guided_decoding": (),
}

# An annotation (`"nvext": {"annotations": [...]}` in the HTTP body, which Dynamo hands on to both workers as it is).
NO_PREFIX_CACHE = "pdstack:no-prefix-cache"


class BadRequest(ValueError):
    """The request cannot be served as it is; the text tells the client what to change."""


def engine_request(
    key: str, request_id: str, data: Mapping[str, Any], max_context: int, default_max_tokens: int
) -> Request:
    """Build the engine's request.

    `key` names the attempt and is unique in this process; `request_id` is Dynamo's and stays the same when a request is
    moved to another worker, so a missing seed is derived from it. `max_tokens` is cut to what fits the context.
    Raises BadRequest if the prompt is empty or too long, or if an option is asked for that the engine does not have.
    """
    token_ids = [int(token) for token in data.get("token_ids") or ()]
    if not token_ids:
        raise BadRequest("the prompt holds no tokens")
    if len(token_ids) >= max_context:
        raise BadRequest(
            f"context limit: the prompt has {len(token_ids)} tokens, this worker serves {max_context} including "
            "at least one token of answer; shorten the prompt"
        )
    refuse_unsupported(data)
    max_tokens = min(max_context - len(token_ids), limit(data, default_max_tokens))
    try:
        chosen = sampling(request_id, data, max_tokens)
    except (TypeError, ValueError) as error:
        raise BadRequest(str(error)) from None
    reuse = NO_PREFIX_CACHE not in (data.get("annotations") or ())
    return Request(request_id=key, token_ids=token_ids, sampling=chosen, reuse=reuse)


def limit(data: Mapping[str, Any], default_max_tokens: int) -> int:
    """Return how many tokens the client allows. Raises BadRequest for less than one."""
    wanted = (data.get("stop_conditions") or {}).get("max_tokens")
    if wanted is None:
        return default_max_tokens
    if int(wanted) < 1:
        raise BadRequest(f"max_tokens: found {wanted}, wanted at least 1")
    return int(wanted)


def sampling(request_id: str, data: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    """Read the sampling options; what is null means OpenAI's default (temperature 1, top_p 1, no top_k)."""
    options = data.get("sampling_options") or {}
    conditions = data.get("stop_conditions") or {}
    ignore_eos = bool(conditions.get("ignore_eos"))
    end = {int(token) for token in data.get("eos_token_ids") or ()}
    stop = {int(token) for name in ("stop_token_ids", "stop_token_ids_hidden") for token in conditions.get(name) or ()}
    seed = options.get("seed")
    top_k = options.get("top_k")
    return SamplingParams(
        temperature=float(options["temperature"]) if options.get("temperature") is not None else 1.0,
        top_p=float(options["top_p"]) if options.get("top_p") is not None else 1.0,
        top_k=int(top_k) if top_k is not None and int(top_k) > 0 else 0,
        seed=int(seed) if seed is not None else seed_of(request_id),
        max_tokens=max_tokens,
        min_tokens=int(conditions.get("min_tokens") or 0),
        stop_token_ids=sorted(stop - end if ignore_eos else stop | end),
        ignore_eos=ignore_eos,
    )


def seed_of(request_id: str) -> int:
    """Derive a seed (63 bits) that prefill and every decode worker compute alike."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big") >> 1


def refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Raise BadRequest for an option that would change the answer and that the engine does not have."""
    options = data.get("sampling_options") or {}
    for name, neutral in UNSUPPORTED.items():
        value = options.get(name)
        if value is not None and value not in neutral:
            raise BadRequest(f"{name}: found {value}, this engine does not have it; leave it out")
    for name in ("logprobs", "prompt_logprobs"):
        if (data.get("output_options") or {}).get(name) is not None:
            raise BadRequest(f"{name}: this engine does not return them; leave it out")
