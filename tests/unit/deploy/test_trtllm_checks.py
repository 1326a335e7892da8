from __future__ import annotations

from typing import Any

import pytest
from tests.unit.deploy.test_trtllm import Deployment

from pdstack.deploy import trtllm_checks, trtllm_fields
from pdstack.deploy.problem import Problem

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def problems(deployment: Deployment) -> list[Problem]:
    return trtllm_checks.problems(deployment.groups, deployment.hosts, deployment.settings)


def changed(inventory: Any, **settings: Any) -> Deployment:
    return Deployment(inventory, **settings)


def worker(inventory: Any, role: str = "decode", position: int = 0, **item: Any) -> Deployment:
    """A deployment with one worker's entry changed."""
    deployment = Deployment(inventory)
    host = {"prefill": "a", "decode": "b"}[role]
    deployment.hosts[host][f"{role}_workers"][position].update(item)
    return deployment


def test_a_right_inventory_has_no_problems(inventory: Any) -> None:
    assert problems(changed(inventory)) == []
    assert problems(changed(inventory, kv_transfer_backend="nixl", router_mode="kv")) == []


def test_another_engine_is_none_of_its_business(inventory: Any) -> None:
    deployment = changed(inventory, trtllm_args={"nonsense": 1})
    deployment.settings["engine"] = "reference"
    assert problems(deployment) == []


ENGINES = [
    ({"common": {"max_batchsize": 4}}, "max_batchsize", "did you mean 'max_batch_size'"),
    ({"decode": {"kv_cache_config": {"tokens_per_blok": 32}}}, "kv_cache_config.tokens_per_blok", "tokens_per_block"),
    ({"common": {"max_batch_size": "64"}}, "max_batch_size", "correct"),
    ({"common": {"max_batch_size": 0}}, "max_batch_size", "correct"),
    ({"common": {"kv_cache_config": {"free_gpu_memory_fraction": 1.5}}}, "free_gpu_memory_fraction", "correct"),
    ({"common": {"backend": "tensorrt"}}, "backend", "correct"),
    ({"common": {"kv_cache_config": 0.9}}, "kv_cache_config", "write"),
    ({"common": {"max_num_tokens": None}}, "max_num_tokens", "remove the key"),
    ({"common": {"model": "/m"}}, "model", "model_ref"),
    ({"common": {"build_config": {}}}, "build_config", "max_batch_size"),
    ({"common": {"cache_transceiver_config": {"backend": "DEFAULT"}}}, "cache_transceiver_config.backend", "correct"),
    ({"common": {"cache_transceiver_config": {"backend": "MOONCAKE"}}}, "cache_transceiver_config.backend", "correct"),
    (
        {"common": {"cache_transceiver_config": {"kv_transfer_sender_future_timeout_ms": 1000}}},
        "kv_transfer_sender_future_timeout_ms", "kv_transfer_timeout_ms",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "what", "fix"), ENGINES)
def test_settings_the_engine_would_refuse_are_refused_first(
    engine: dict[str, Any], what: str, fix: str, inventory: Any
) -> None:
    (problem,) = problems(changed(inventory, trtllm_engine=engine))
    assert problem.what.startswith("trtllm_engine.")
    assert what in problem.what
    assert fix in problem.fix


def test_a_worker_s_own_settings_are_checked_alike(inventory: Any) -> None:
    (problem,) = problems(worker(inventory, engine={"kv_cache_config": {"dtyp": "fp8"}}))
    assert problem.what == "decode_workers[0] on b.engine.kv_cache_config.dtyp"
    assert "did you mean 'dtype'" in problem.fix


ARGS = [
    ({"max_file_size": 1}, "did you mean 'max_file_size_mb'"),
    ({"max-file-size-mb": 1}, "did you mean 'max_file_size_mb'"),
    ({"max_file_size_mb": "many"}, "correct"),
    ({"migration_limit": 1}, "set migration_limit"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size in trtllm_engine"),
    ({"--tensor-parallel-size": 2}, "tensor_parallel_size in trtllm_engine"),
    ({"kv_block_size": 64}, "tokens_per_block"),
    ({"disaggregation_mode": "decode"}, "group prefill or decode"),
    ({"disaggregation_strategy": "decode_first"}, "remove it"),
    ({"override_engine_args": "{}"}, "trtllm_engine"),
    ({"modality": "multimodal"}, "correct"),
]


@pytest.mark.parametrize(("args", "fix"), ARGS)
def test_options_that_cannot_be_are_refused(args: dict[str, Any], fix: str, inventory: Any) -> None:
    for deployment in (changed(inventory, trtllm_args=args), worker(inventory, args=args)):
        (problem,) = problems(deployment)
        assert problem.what.split(".")[-1] in args
        assert fix in problem.fix


ENVS = [
    ({"TRTLLM_USE_UCX_KVCACHE": "1"}, "kv_transfer_backend"),
    ({"LD_LIBRARY_PATH": "/opt/x"}, "remove it"),
    ({"DYN_REQUEST_PLANE": "tcp"}, "remove it"),
    ({"CUDA_VISIBLE_DEVICES": "0"}, "gpus"),
    ({"HF_TOKEN": "x"}, "model_token_file"),
    ({"UCX_NET_DEVICE": "mlx5_0:1"}, "kv_net_devices"),
    ({"UCX_TLS": "rc,sm,self"}, "cuda"),
    ({"DYN_HEALTH_CHECK_ENABLED": "true"}, "remove it"),
    ({"TRTLLM_DISAGG_BENCHMARK_GEN_ONLY": "1"}, "remove it"),
]


@pytest.mark.parametrize(("env", "fix"), ENVS)
def test_variables_that_contradict_the_deployment_are_refused(env: dict[str, str], fix: str, inventory: Any) -> None:
    (problem,) = problems(worker(inventory, env=env))
    assert next(iter(env)) in problem.what
    assert fix in problem.fix


def test_nixl_needs_its_buffer_and_ucx_does_not(inventory: Any) -> None:
    deployment = worker(inventory, env={"TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE": "0B"})
    assert problems(deployment) == []
    deployment.settings["kv_transfer_backend"] = "nixl"
    (problem,) = problems(deployment)
    assert "NIXL fails" in problem.wanted


def test_two_workers_on_one_gpu(inventory: Any) -> None:
    (problem,) = problems(worker(inventory, position=1, gpus=[0]))
    assert problem.what == "GPU 0 of b"
    assert "decode_workers[0]" in problem.found
    assert "decode_workers[1]" in problem.found


def test_prefill_and_decode_of_a_host_do_not_share_a_gpu_either(inventory: Any) -> None:
    deployment = changed(inventory)
    deployment.groups["decode"] = ["a"]
    deployment.hosts["a"]["decode_workers"] = [{"gpus": [1]}]
    (problem,) = problems(deployment)
    assert problem.what == "GPU 1 of a"


def test_a_gpu_that_the_host_does_not_have(inventory: Any) -> None:
    (problem,) = problems(worker(inventory, position=1, gpus=[2]))
    assert "0 to 1" in problem.wanted
    assert "gpu_count" in problem.wanted


@pytest.mark.parametrize(
    ("gpus", "words"), [([], "the GPUs of the worker"), ([1, 1], "each GPU once"), (list(range(17)), "at most 16")]
)
def test_gpus_of_one_worker(gpus: list[int], words: str, inventory: Any) -> None:
    deployment = worker(inventory, position=1, gpus=gpus)
    deployment.hosts["b"]["gpu_count"] = 32
    deployment.hosts["b"]["decode_workers"][0]["gpus"] = [31]
    assert words in " ".join(problem.wanted for problem in problems(deployment))


def test_a_gpu_host_says_how_many_it_has(inventory: Any) -> None:
    deployment = changed(inventory)
    del deployment.hosts["a"]["gpu_count"]
    (problem,) = problems(deployment)
    assert problem.what == "gpu_count on a"


@pytest.mark.parametrize(
    "engine", [{"tensor_parallel_size": 1}, {"tensor_parallel_size": 4}, {"pipeline_parallel_size": 3}]
)
def test_parallel_sizes_and_gpus(engine: dict[str, Any], inventory: Any) -> None:
    (problem,) = problems(worker(inventory, "prefill", engine=engine))
    assert "ranks for 2 GPUs" in problem.found
    assert "tensor_parallel_size" in problem.fix


def test_roles_may_differ_in_parallel_size(inventory: Any) -> None:
    deployment = worker(inventory, "prefill", engine={"tensor_parallel_size": 2})
    assert problems(deployment) == []


def test_one_side_with_another_backend(inventory: Any) -> None:
    found = problems(changed(inventory, trtllm_engine={"decode": {"cache_transceiver_config": {"backend": "NIXL"}}}))
    assert [problem.what for problem in found] == [
        f"decode_workers[{position}] on b: cache_transceiver_config.backend" for position in (0, 1)
    ]
    assert "kv_transfer_backend" in found[0].fix


def test_a_buffer_smaller_than_the_longest_prompt(inventory: Any) -> None:
    engine = {"prefill": {"cache_transceiver_config": {"max_tokens_in_buffer": 4096}}}
    (problem,) = problems(changed(inventory, trtllm_engine=engine))
    assert (problem.found, problem.wanted) == ("4096", "8192 or more (trtllm_max_input_tokens)")


SHAPES = [
    ({"prefill": {"disable_overlap_scheduler": False}}, "disable_overlap_scheduler"),
    ({"prefill": {"max_beam_width": 4}}, "max_beam_width"),
    ({"prefill": {"max_seq_len": 8192}}, "max_seq_len"),
    ({"prefill": {"enable_chunked_prefill": False, "max_num_tokens": 4096}}, "max_num_tokens"),
    ({"prefill": {"kv_cache_config": {"max_tokens": 1024}}}, "kv_cache_config.max_tokens"),
    ({"prefill": {"cuda_graph_config": {"batch_sizes": [1, 2], "max_batch_size": 8}}}, "cuda_graph_config"),
    ({"prefill": {"max_batch_size": 16384}}, "max_batch_size"),
    ({"prefill": {"kv_cache_config": {"dtype": "fp8"}}}, "kv_cache_config.dtype of the workers"),
    ({"decode": {"kv_cache_config": {"tokens_per_block": 64}}}, "kv_cache_config.tokens_per_block of the workers"),
    ({"decode": {"dtype": "float16"}}, "dtype of the workers"),
]


@pytest.mark.parametrize(("engine", "what"), SHAPES)
def test_settings_that_do_not_go_together(engine: dict[str, Any], what: str, inventory: Any) -> None:
    (problem,) = problems(changed(inventory, trtllm_engine=engine))
    assert problem.what.endswith(what)
    assert problem.fix


@pytest.mark.parametrize(
    "settings",
    [
        {"trtllm_args": {"publish_events_and_metrics": False}},
        {"trtllm_engine": {"common": {"kv_cache_config": {"enable_block_reuse": False}}}},
    ],
)
def test_a_router_by_kv_needs_events_of_prefill(settings: dict[str, Any], inventory: Any) -> None:
    (problem,) = problems(changed(inventory, router_mode="kv", **settings))
    assert "router_mode is kv" in problem.wanted
    assert problems(changed(inventory, router_mode="random", **settings)) == []


MODELS = [
    ({"model_source": "hub", "model_ref": "Qwen3", "model_revision": COMMIT}, "model_ref"),
    ({"model_source": "hub", "model_ref": "Qwen/Qwen3-0.6B", "model_revision": "main"}, "model_revision"),
    ({"model_source": "hub", "model_ref": "Qwen/Qwen3-0.6B", "model_revision": ""}, "model_revision"),
    ({"model_source": "path", "model_ref": "models/qwen"}, "model_ref"),
]


@pytest.mark.parametrize(("settings", "what"), MODELS)
def test_the_model_is_pinned(settings: dict[str, Any], what: str, inventory: Any) -> None:
    deployment = changed(inventory)
    deployment.settings.update(settings)
    (problem,) = problems(deployment)
    assert problem.what.startswith(what)


def test_settings_of_other_types_are_left_to_the_checks_of_types(inventory: Any) -> None:
    deployment = changed(inventory, trtllm_engine_defaults=None, trtllm_engine=[], trtllm_args="x")
    deployment.settings["trtllm_max_input_tokens"] = "many"
    assert problems(deployment) == []


def test_what_is_refused_is_not_offered() -> None:
    assert not set(trtllm_fields.REFUSED) & set(trtllm_fields.ENGINE)
    assert not set(trtllm_fields.REFUSED_OPTIONS) & set(trtllm_fields.OPTIONS)


def test_every_field_that_is_offered_is_one_of_the_engine(inventory: Any) -> None:
    """The stand-in's models come from the same release and were written apart from this table."""
    from tests.unit.deploy import consumers

    tables = {key: table for key, table in trtllm_fields.ENGINE.items() if isinstance(table, dict)}
    script = (
        "import json; from tensorrt_llm.llmapi import llm_args as a; "
        "models = {'': a.TorchLlmArgs, **a.NESTED}; "
        "print(json.dumps({name: list(model.model_fields) for name, model in models.items()}))"
    )
    known = consumers._run(script)
    assert set(trtllm_fields.ENGINE) <= set(known[""])
    for key, fields in known.items():
        if key:
            assert set(tables[key]) == set(fields), key


def test_the_router_counts_in_the_workers_blocks(inventory: Any) -> None:
    both = {role: {"kv_cache_config": {"tokens_per_block": 64}} for role in ("prefill", "decode")}
    (problem,) = problems(changed(inventory, trtllm_engine=both))
    assert "'32': the frontend" in problem.found
    assert problems(changed(inventory, trtllm_engine={"common": both["decode"]})) == []


def test_a_chat_template_is_where_the_container_sees_it(inventory: Any) -> None:
    assert problems(changed(inventory, trtllm_args={"custom_jinja_template": "/models/m/chat.jinja"})) == []
    (problem,) = problems(changed(inventory, trtllm_args={"custom_jinja_template": "/srv/chat.jinja"}))
    assert problem.wanted == "a file below /models/m (model_ref)"
