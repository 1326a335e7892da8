"""Stands in for TensorRT-LLM in the lab: the Python interface that `dynamo.trtllm` uses, over pdstack's CPU engine.

Arguments are refused as TensorRT-LLM refuses them, requests are served by real weights, and the KV cache of a prompt
moves from the prefill to the decode worker over UCX or NIXL. Only the GPU engine is not there.
"""

from __future__ import annotations

from tensorrt_llm._lab.llm import LLM as LLM
from tensorrt_llm.llmapi.llm import SamplingParams as SamplingParams
from tensorrt_llm.version import __version__ as __version__

print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", flush=True)
