"""What TensorRT-LLM 1.2.0rc3 takes in an engine's YAML, and `python3 -m dynamo.trtllm` (0.7.0.post1) as options.

The engine's models forbid unknown keys: a misspelt one ends the worker after minutes of loading, so it is refused here.
ENGINE is TorchLlmArgs and what it is made of, as of November 2025 (llmapi/llm_args.py, the version that has
kv_transfer_timeout_ms); OPTIONS is dynamo/trtllm/utils/trtllm_utils.py of the wheel. A key that this release may or
may not have is in REFUSED, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from pdstack.deploy.schema import Field

Table: TypeAlias = "Mapping[str, Field | Table]"


def _optional(kind: str, minimum: float | None = None, maximum: float | None = None, *choices: str) -> Field:
    return Field(kind, minimum, maximum, choices, required=False)


INT = _optional("int", 0)
COUNT = _optional("int", 1)
BOOL = _optional("bool")
TEXT = _optional("str")
SHARE = _optional("number", 0, 1)
# A part that is passed on as it is: TensorRT-LLM's own checks are all it gets.
FREE = _optional("dict")

BACKENDS = ("UCX", "NIXL")

CACHE_TRANSCEIVER: Table = {
    "backend": _optional("str", None, None, *BACKENDS),
    "max_tokens_in_buffer": COUNT,
    "kv_transfer_timeout_ms": COUNT,
}

KV_CACHE: Table = {
    "enable_block_reuse": BOOL,
    "max_tokens": COUNT,
    "max_attention_window": _optional("ints", 1),
    "sink_token_length": INT,
    "free_gpu_memory_fraction": SHARE,
    "host_cache_size": INT,
    "onboard_blocks": BOOL,
    "cross_kv_cache_fraction": SHARE,
    "secondary_offload_min_priority": INT,
    "event_buffer_max_size": INT,
    "attention_dp_events_gather_period_ms": INT,
    "enable_partial_reuse": BOOL,
    "copy_on_partial_reuse": BOOL,
    "use_uvm": BOOL,
    "max_gpu_total_bytes": INT,
    "dtype": TEXT,
    "mamba_ssm_cache_dtype": _optional("str", None, None, "auto", "float16", "bfloat16", "float32"),
    "tokens_per_block": COUNT,
}

CUDA_GRAPH: Table = {"batch_sizes": _optional("ints", 1), "max_batch_size": INT, "enable_padding": BOOL}

SCHEDULER: Table = {
    "capacity_scheduler_policy": _optional("str", None, None, "MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"),
    "context_chunking_policy": _optional("str", None, None, "FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"),
    "dynamic_batch_config": {
        "enable_batch_size_tuning": BOOL,
        "enable_max_num_tokens_tuning": BOOL,
        "dynamic_batch_moving_average_window": COUNT,
    },
}

MOE: Table = {
    "backend": _optional("str", None, None, "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"),
    "max_num_tokens": COUNT,
    "load_balancer": FREE,
    "disable_finalize_fusion": BOOL,
    "use_low_precision_moe_combine": BOOL,
}

TORCH_COMPILE: Table = {
    "enable_fullgraph": BOOL,
    "enable_inductor": BOOL,
    "enable_piecewise_cuda_graph": BOOL,
    "capture_num_tokens": _optional("ints", 1),
    "enable_userbuffers": BOOL,
    "max_num_streams": COUNT,
}

PEFT_CACHE: Table = {
    "num_host_module_layer": INT,
    "num_device_module_layer": INT,
    "optimal_adapter_size": COUNT,
    "max_adapter_size": COUNT,
    "num_put_workers": COUNT,
    "num_ensure_workers": COUNT,
    "num_copy_streams": COUNT,
    "max_pages_per_block_host": COUNT,
    "max_pages_per_block_device": COUNT,
    "device_cache_percent": SHARE,
    "host_cache_size": INT,
}

ENGINE: Table = {
    "backend": _optional("str", None, None, "pytorch"),
    "trust_remote_code": BOOL,
    "tokenizer_mode": _optional("str", None, None, "auto", "slow"),
    "skip_tokenizer_init": BOOL,
    "dtype": TEXT,
    "tensor_parallel_size": COUNT,
    "pipeline_parallel_size": COUNT,
    "context_parallel_size": COUNT,
    "moe_cluster_parallel_size": COUNT,
    "moe_tensor_parallel_size": COUNT,
    "moe_expert_parallel_size": COUNT,
    "enable_attention_dp": BOOL,
    "enable_lm_head_tp_in_adp": BOOL,
    "cp_config": FREE,
    "load_format": _optional("str", None, None, "auto", "dummy", "vision_only"),
    "fail_fast_on_attention_window_too_large": BOOL,
    "enable_lora": BOOL,
    "lora_config": FREE,
    "kv_cache_config": KV_CACHE,
    "enable_chunked_prefill": BOOL,
    "guided_decoding_backend": _optional("str", None, None, "xgrammar", "llguidance"),
    "iter_stats_max_iterations": INT,
    "request_stats_max_iterations": INT,
    "peft_cache_config": PEFT_CACHE,
    "scheduler_config": SCHEDULER,
    "cache_transceiver_config": CACHE_TRANSCEIVER,
    "sparse_attention_config": FREE,
    "speculative_config": FREE,
    "max_batch_size": COUNT,
    "max_input_len": COUNT,
    "max_seq_len": COUNT,
    "max_beam_width": COUNT,
    "max_num_tokens": COUNT,
    "gather_generation_logits": BOOL,
    "num_postprocess_workers": INT,
    "postprocess_tokenizer_dir": TEXT,
    "return_perf_metrics": BOOL,
    "garbage_collection_gen0_threshold": COUNT,
    "cuda_graph_config": CUDA_GRAPH,
    "attention_dp_config": {"enable_balance": BOOL, "timeout_iters": INT, "batching_wait_iters": INT},
    "disable_overlap_scheduler": BOOL,
    "moe_config": MOE,
    "attn_backend": TEXT,
    "sampler_type": _optional("str", None, None, "auto", "TRTLLMSampler", "TorchSampler"),
    "enable_iter_perf_stats": BOOL,
    "enable_iter_req_stats": BOOL,
    "print_iter_log": BOOL,
    "perf_metrics_max_requests": INT,
    "batch_wait_timeout_ms": _optional("number", 0),
    "batch_wait_timeout_iters": INT,
    "batch_wait_max_tokens_ratio": SHARE,
    "torch_compile_config": TORCH_COMPILE,
    "enable_autotuner": BOOL,
    "enable_layerwise_nvtx_marker": BOOL,
    "enable_min_latency": BOOL,
    "stream_interval": COUNT,
    "force_dynamic_quantization": BOOL,
    "allreduce_strategy": _optional(
        "str", None, None, "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL",
        "NCCL_SYMMETRIC",
    ),
    "checkpoint_format": TEXT,
    "kv_connector_config": FREE,
    "mm_encoder_only": BOOL,
}  # fmt: skip

# Keys that mean "off" when they are null.
NULLABLE = frozenset({
    "cuda_graph_config", "peft_cache_config", "torch_compile_config", "attention_dp_config", "speculative_config",
    "sparse_attention_config", "lora_config", "kv_connector_config", "guided_decoding_backend", "max_seq_len",
    "max_batch_size", "max_input_len", "scheduler_config.context_chunking_policy",
    "scheduler_config.dynamic_batch_config", "kv_cache_config.max_tokens", "kv_cache_config.host_cache_size",
    "kv_cache_config.free_gpu_memory_fraction", "kv_cache_config.max_attention_window",
    "cuda_graph_config.batch_sizes", "moe_config.max_num_tokens", "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
})  # fmt: skip

# Keys that exist, or existed, or will, and do not belong into an engine's settings: why, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "model": ("the model is the same for all workers and the frontend", "set model_source and model_ref"),
    "tokenizer": ("the tokenizer is the model's", "set model_source and model_ref"),
    "revision": ("the files are fetched once, before any worker starts", "set model_revision"),
    "tokenizer_revision": ("the files are fetched once, before any worker starts", "set model_revision"),
    "gpus_per_node": ("it is the number of the worker's gpus", "set gpus in the worker's entry"),
    "build_config": ("it belongs to engines that are built, not to backend pytorch", "set max_batch_size and the like"),
    "batched_logits_processor": ("it is a Python object", "remove it"),
    "checkpoint_loader": ("it is a Python object", "set checkpoint_format"),
    "mpi_session": ("it is a Python object", "remove it"),
    "orchestrator_type": ("workers are started with MPI, one container each", "remove it"),
    "ray_worker_extension_cls": ("workers are started with MPI, one container each", "remove it"),
    "reasoning_parser": (
        "Dynamo's frontend parses answers, not the engine",
        "set dyn_reasoning_parser in trtllm_args or the worker's args",
    ),
    "decoding_config": ("it is deprecated", "set speculative_config"),
    "quant_config": ("backend pytorch reads it from the model", "remove it"),
    "calib_config": ("it belongs to engines that are built, not to backend pytorch", "remove it"),
    "fast_build": ("it belongs to engines that are built, not to backend pytorch", "remove it"),
    "enable_build_cache": ("it belongs to engines that are built, not to backend pytorch", "remove it"),
    "cache_transceiver_config.kv_transfer_sender_future_timeout_ms": (
        "it came at about 1.2.0rc3, and a release without it refuses the whole file",
        "remove it; kv_transfer_timeout_ms ends a transfer that does not",
    ),
    "cache_transceiver_config.transceiver_runtime": ("it is of 2026; 1.2.0rc3 refuses the whole file", "remove it"),
    "peft_cache_config.lora_prefetch_dir": ("TensorRT-LLM refuses it: prefetch is not supported", "remove it"),
}  # fmt: skip

# Options by their long names with _ for -.
OPTIONS: Mapping[str, Field] = {
    "publish_events_and_metrics": BOOL,
    "modality": _optional("str", None, None, "text"),
    "max_file_size_mb": COUNT,
    "allowed_local_media_path": TEXT,
    "dyn_tool_call_parser": TEXT,
    "dyn_reasoning_parser": TEXT,
    "custom_jinja_template": TEXT,
    "dump_config_to": TEXT,
}

_ENGINE_HAS_IT = "one description serves the engine's file and the command line"
# Options that are derived, or that this release does not have: why, and what to do.
REFUSED_OPTIONS: Mapping[str, tuple[str, str]] = {
    **{
        name: (_ENGINE_HAS_IT, f"set {key} in trtllm_engine or the worker's engine")
        for name, key in {
            "tensor_parallel_size": "tensor_parallel_size",
            "pipeline_parallel_size": "pipeline_parallel_size",
            "expert_parallel_size": "moe_expert_parallel_size",
            "max_batch_size": "max_batch_size",
            "max_num_tokens": "max_num_tokens",
            "max_seq_len": "max_seq_len",
            "max_beam_width": "max_beam_width",
            "kv_block_size": "kv_cache_config.tokens_per_block",
            "free_gpu_memory_fraction": "kv_cache_config.free_gpu_memory_fraction",
        }.items()
    },
    "migration_limit": ("Dynamo wants 0 of prefill workers, and refuses them otherwise", "set migration_limit"),
    "endpoint": ("the namespace and the role decide it", "set pdstack_name, or put the host into another group"),
    "disaggregation_mode": ("the group decides it", "put the host into the group prefill or decode"),
    "model_path": ("the model is the same for all workers and the frontend", "set model_source and model_ref"),
    "served_model_name": ("prefill and decode must use one name", "set model_name"),
    "gpus_per_node": ("it is the number of the worker's gpus", "set gpus in the worker's entry"),
    "extra_engine_args": ("the file is written by the deployment", "set trtllm_engine or the worker's engine"),
    "override_engine_args": (
        "it would be laid over the file that was checked", "set trtllm_engine or the worker's engine",
    ),
    "store_kv": ("workers on several hosts meet in etcd", "remove it"),
    "encode_endpoint": ("there are no encode workers in this deployment", "remove it"),
    "use_nixl_connect": ("it does nothing for text", "remove it"),
    "disaggregation_strategy": ("this release has no such option: the frontend decides the order", "remove it"),
    "next_endpoint": ("this release has no such option: the frontend decides the order", "remove it"),
}  # fmt: skip

# Variables that a worker's entry must not set: why, and what to do. Those that choose a backend or its libraries are in
# pdstack.deploy.fabrics, which refuses them for profiles too.
REFUSED_ENV: Mapping[str, tuple[str, str]] = {
    "ETCD_ENDPOINTS": ("it is derived from the group etcd", "remove it"),
    "NATS_SERVER": ("it is derived from the group nats", "remove it"),
    "DYN_NAMESPACE": ("it must be one for all", "set pdstack_namespace"),
    "DYN_SYSTEM_PORT": ("it is the worker's status port", "set pdstack_ports.worker_status"),
    "DYN_SYSTEM_HOST": ("it is the host's address", "set pdstack_address"),
    "DYN_REQUEST_PLANE": (
        "the request plane is NATS: with tcp a host's workers take one port, and NATS must be there all the same",
        "remove it",
    ),
    "DYN_STORE_KV": ("workers on several hosts meet in etcd", "remove it"),
    "TRTLLM_NIXL_PORT": ("every worker needs ports of its own", "set pdstack_ports.worker_ranks"),
    "CUDA_VISIBLE_DEVICES": ("it is derived from gpus", "set gpus in the worker's entry"),
    "CUDA_DEVICE_ORDER": ("it is derived from gpus", "remove it"),
    "NVIDIA_VISIBLE_DEVICES": ("it is derived from gpus", "set gpus in the worker's entry"),
    "NIXL_BACKEND": ("it breaks the choice of NIXL's plugin", "set TRTLLM_NIXL_KVCACHE_BACKEND"),
    "UCX_NET_DEVICE": ("UCX reads UCX_NET_DEVICES and ignores this", "set kv_net_devices of the host"),
    "TRTLLM_DISAGG_BENCHMARK_GEN_ONLY": ("decode would answer without the prompt's KV", "remove it"),
    "HF_TOKEN": ("whoever may inspect the container reads it", "set model_token_file"),
    "HUGGING_FACE_HUB_TOKEN": ("whoever may inspect the container reads it", "set model_token_file"),
}  # fmt: skip

# What the image may have set and the command takes away: the engine's file says the backend.
UNSET = ("TRTLLM_USE_UCX_KVCACHE", "TRTLLM_USE_NIXL_KVCACHE", "TRTLLM_USE_MPI_KVCACHE", "TRTLLM_USE_MOONCAKE_KVCACHE")
