"""What the engine is asked to do: settings, one request, its results and its refusals.

Plain dataclasses without numpy, so that the worker and the tests can import them cheaply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

__all__ = [
    "ATTENTION_TILE",
    "ContextTooLong",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "EngineStopped",
    "FinishReason",
    "KvEvent",
    "KvEventSink",
    "OnAdmitted",
    "OnProgress",
    "Overloaded",
    "PrefillResult",
    "Request",
    "RequestCancelled",
    "Reservation",
    "SamplingParams",
    "Step",
]

ATTENTION_TILE = 128
"""Keys per attention tile, in tokens, counted from position 0.

A constant and no setting: every query sees its keys padded to a multiple of it, which makes the result of a
position depend on the position alone (see `pdstack.engine.model`). Workers with different tiles would disagree.
"""

FinishReason = Literal["stop", "length", "cancelled"]

OnAdmitted = Callable[[list[int], list[int], int], None]
"""Gets the blocks of a prompt in the order of its tokens, their generations, and the number of tokens."""

OnProgress = Callable[[int], None]
"""Gets the number of leading blocks of a prompt that are final."""


class EngineError(RuntimeError):
    """Anything the engine refuses or fails at; the text names what was checked, found and wanted."""


class ContextTooLong(EngineError):
    """The request can never run here: longer than the context limit, or than the whole KV pool."""


class Overloaded(EngineError):
    """The queue is full, or no blocks became free before the queue timeout. Worth trying again later."""


class RequestCancelled(EngineError):
    """The request was cancelled before it had a result."""


class EngineStopped(EngineError):
    """The engine is not running (never started, stopped, or its thread failed)."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. Counts are in tokens or blocks, times in seconds.

    Raises ValueError at construction for a value that can not work.
    """

    block_size: int = 16
    kv_blocks: int = 1024
    max_context: int = 2048
    max_batch: int = 64
    prefill_chunk: int = 128
    queue_limit: int = 256
    queue_timeout_s: float = 30.0
    threads: int = 2
    prefix_cache: bool = True
    default_max_tokens: int = 512

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "kv_blocks",
            "max_context",
            "max_batch",
            "prefill_chunk",
            "threads",
            "default_max_tokens",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"engine.{name}: found {value!r}, wanted a whole number of at least 1")
        if isinstance(self.queue_limit, bool) or not isinstance(self.queue_limit, int) or self.queue_limit < 0:
            raise ValueError(f"engine.queue_limit: found {self.queue_limit!r}, wanted a whole number of at least 0")
        if not self.queue_timeout_s > 0:
            raise ValueError(f"engine.queue_timeout_s: found {self.queue_timeout_s!r}, wanted more than 0 seconds")
        if ATTENTION_TILE % self.block_size:
            raise ValueError(
                f"engine.block_size: found {self.block_size}, wanted a divisor of {ATTENTION_TILE} (8, 16, 32, 64, 128)"
            )
        if self.prefill_chunk % self.block_size:
            raise ValueError(
                f"engine.prefill_chunk: found {self.prefill_chunk}, wanted a multiple of block_size {self.block_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from the `engine` object of a worker's configuration; an unknown key is a ValueError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"engine: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    temperature 0 (or None) is greedy. top_k 0, -1 or None is off; top_p 1 or None is off. Without a seed one is
    drawn per request. max_tokens None means the engine's default. A stop token is part of the output and ends it
    with "stop"; before min_tokens no stop token can be chosen. The model's own end tokens always count as stop
    tokens unless ignore_eos, which also takes them out of stop_token_ids.
    """

    temperature: float | None = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature: found {self.temperature!r}, wanted 0 to 100")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: found {self.top_p!r}, wanted more than 0 and at most 1")
        if self.top_k is not None and self.top_k < -1:
            raise ValueError(f"top_k: found {self.top_k!r}, wanted at least 1, or 0 / -1 for off")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: found {self.max_tokens!r}, wanted at least 1")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise ValueError(f"min_tokens: found {self.min_tokens!r}, wanted at least 0")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. request_id is unique among the requests the engine knows at that time.

    Without reuse no block of it comes out of the prefix cache, for checks and measurements.
    """

    request_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    reuse: bool = True


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A computed prompt. `blocks` hold the KV of `tokens` prompt tokens and stay referenced until `release`.

    finish_reason is "stop" if first_token already ends the request. cached_tokens came from the prefix cache.
    queue_seconds is the wait for blocks and a slot, seconds the rest until the token was there.
    """

    first_token: int
    finish_reason: FinishReason | None
    blocks: list[int]
    tokens: int
    cached_tokens: int
    seconds: float
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks for a prompt, in the order of its tokens.

    The first `held` of them hold its KV already. They are shared with others: never write them. The rest is one's own.
    """

    blocks: list[int]
    held: int


@dataclass(slots=True)
class Step:
    """Tokens that became ready together, in order; the last step of a request carries finish_reason."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None


class KvEventSink(Protocol):
    """Who wants to know what the prefix cache holds. Called in order, from any thread, with the engine's lock held."""

    def stored(self, token_ids: Sequence[int], block_hashes: Sequence[int], parent_hash: int | None) -> None:
        """Take note of new blocks that follow each other, after the block parent_hash (None: start of a prompt)."""

    def removed(self, block_hashes: Sequence[int]) -> None:
        """Take note of blocks that are gone."""


@dataclass(frozen=True, slots=True)
class KvEvent:
    """The prefix cache gained or lost full blocks.

    block_hashes are signed 64-bit, each covering its block and everything before it. For "stored", token_ids are
    those of the new blocks only and parent_hash is the block before them (None at the start of a prompt).
    """

    kind: Literal["stored", "removed"]
    block_hashes: list[int]
    token_ids: list[int] = field(default_factory=list)
    parent_hash: int | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of the engine. used_blocks counts blocks that somebody references; cached ones are reusable."""

    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    held_requests: int
    reserved_requests: int
    quarantined_blocks: int
    waiting: int
    prefilling: int
    decoding: int
    max_batch: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: int
    cancelled: int
    refused: int
    failed: int
    step_running_s: float

    @property
    def kv_usage(self) -> float:
        """Share of the pool that is referenced, 0 to 1."""
        return self.used_blocks / self.total_blocks
