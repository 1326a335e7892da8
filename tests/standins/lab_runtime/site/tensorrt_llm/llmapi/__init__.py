"""Arguments of the LLM API."""

from __future__ import annotations

from tensorrt_llm.llmapi.disagg_utils import DisaggregatedParams as DisaggregatedParams
from tensorrt_llm.llmapi.llm_args import BuildConfig as BuildConfig
from tensorrt_llm.llmapi.llm_args import CacheTransceiverConfig as CacheTransceiverConfig
from tensorrt_llm.llmapi.llm_args import CapacitySchedulerPolicy as CapacitySchedulerPolicy
from tensorrt_llm.llmapi.llm_args import DynamicBatchConfig as DynamicBatchConfig
from tensorrt_llm.llmapi.llm_args import KvCacheConfig as KvCacheConfig
from tensorrt_llm.llmapi.llm_args import SchedulerConfig as SchedulerConfig
