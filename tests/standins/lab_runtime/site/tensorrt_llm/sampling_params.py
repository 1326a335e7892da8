"""How tokens are chosen. The fields that `dynamo.trtllm` sets, with TensorRT-LLM's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class LogitsProcessor:
    """Base class of logits processors; none is called here."""


@dataclass
class SamplingParams:
    """None for temperature, top_k and top_p together means greedy."""

    end_id: int | None = None
    max_tokens: int = 32
    min_tokens: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logits_processor: Any = None
