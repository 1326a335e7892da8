"""What an agent is, for its whole life: prefill or decode."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Prefill owns KV and lets it be read; decode reads it. There is no agent that does both."""

    PREFILL = "prefill"
    DECODE = "decode"


class ReleaseReason(StrEnum):
    """Why exported blocks may be reused. In no case is a read of them running whose result would still be used."""

    READ = "read"  # decode has read them, checked them, and said so
    FAILED = "failed"  # decode said that its read failed
    DISCARDED = "discarded"  # decode does not need them
    WITHDRAWN = "withdrawn"  # prefill took the offer back before it was taken up
    EXPIRED = "expired"  # nobody asked before the deadline
    PEER_LOST = "peer_lost"  # the reader's connection is gone and it did not come back in time
    UNCOMPUTED = "uncomputed"  # the prompt could not be computed
    STALE = "stale"  # the blocks were given to somebody else under the export: a defect of the engine
    CLOSED = "closed"  # the agent was closed
