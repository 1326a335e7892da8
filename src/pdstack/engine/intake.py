"""From a request to a sequence: what can never run here is refused before it waits for anything."""

from __future__ import annotations

import os
import time

from pdstack.engine.config import ContextTooLong, EngineConfig, EngineError, Request
from pdstack.engine.scheduler import Purpose, Sequence, blocks_needed
from pdstack.models.hf_config import ModelConfig

__all__ = ["new_sequence"]


def new_sequence(request: Request, purpose: Purpose, config: EngineConfig, model: ModelConfig) -> Sequence:
    """Check `request` and make its sequence.

    Raises EngineError for tokens that the model does not have, ContextTooLong for what never fits the context or pool.
    """
    length, limit = len(request.token_ids), config.max_context
    if length < 1:
        raise EngineError(f"request {request.request_id}: the prompt is empty, wanted at least one token")
    if length >= limit:
        raise ContextTooLong(
            f"request {request.request_id}: the prompt has {length} tokens, wanted at most {limit - 1}, for the "
            f"context limit is {limit}; shorten the prompt"
        )
    tokens = [int(token) for token in request.token_ids]
    if not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise EngineError(
            f"request {request.request_id}: token ids {min(tokens)} to {max(tokens)}, wanted 0 to "
            f"{model.vocab_size - 1}; does the tokenizer belong to this model?"
        )
    sampling = request.sampling
    eos = model.eos_token_ids
    stop = frozenset(sampling.stop_token_ids)
    wanted = sampling.max_tokens if sampling.max_tokens is not None else config.default_max_tokens
    sequence = Sequence(
        request=request,
        purpose=purpose,
        prompt_length=length,
        max_new=min(wanted, limit - length),
        min_new=sampling.min_tokens or 0,
        stop=stop - eos if sampling.ignore_eos else stop | eos,
        seed=sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(8), "little"),
        tokens=tokens,
        submitted_at=time.monotonic(),
    )
    needed = blocks_needed(sequence, config.block_size)
    if needed > config.kv_blocks:
        raise ContextTooLong(
            f"request {request.request_id}: {length} prompt and {sequence.max_new} answer tokens need {needed} KV "
            f"blocks, the pool has {config.kv_blocks}; lower max_tokens or raise engine.kv_blocks"
        )
    return sequence
