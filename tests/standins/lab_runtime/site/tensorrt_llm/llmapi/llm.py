"""The names that `dynamo.trtllm` imports from here."""

from __future__ import annotations

from tensorrt_llm.sampling_params import SamplingParams as SamplingParams
