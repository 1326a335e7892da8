"""The reference engine: real models on CPUs, with prefill and decode that can run apart.

`Engine` is the whole of it for a worker; `pdstack.engine.aggregate` runs requests undivided, as the truth that a
disaggregated deployment is compared with.
"""

from __future__ import annotations

from pdstack.engine.config import (
    ContextTooLong,
    EngineConfig,
    EngineError,
    EngineStats,
    EngineStopped,
    FinishReason,
    KvEventSink,
    OnAdmitted,
    OnProgress,
    Overloaded,
    PrefillResult,
    Request,
    RequestCancelled,
    Reservation,
    SamplingParams,
    Step,
)
from pdstack.engine.core import Engine

__all__ = [
    "ContextTooLong",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "EngineStopped",
    "FinishReason",
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
