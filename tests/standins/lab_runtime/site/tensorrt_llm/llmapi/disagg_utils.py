"""What a prefill worker hands to a decode worker through the request plane."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DisaggregatedParams:
    """request_type is context_only, generation_only or context_and_generation."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
