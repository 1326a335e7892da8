from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import fabrics, topology, trtllm_proof

ENGINE = {"defaults": {}, "site": {}, "max_input_tokens": 4096, "timeout_ms": 60000}
READ = "[1.1] [h:1:0]   | c intra-node cfg#1 | remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda |\n"
UCX = "[TRT-LLM] [I] Using UCX kv-cache transceiver. If your devices are not in the same domain\n"
NIXL = "[TensorRT-LLM][INFO] NixlTransferAgent::NixlTransferAgent mAddress: 10.0.0.1:1\n"


def table(transport: str) -> str:
    return READ + f"[1.1] [h:1:0]   | 0..inf | zero-copy | {transport} |\n"


def expected(inventory: Any, *names: str, backend: str = "nixl", **variables: Any) -> dict[str, dict[str, Any]]:
    gpus = {"prefill_workers": [{"gpus": [0]}], "decode_workers": [{"gpus": [1], "env": {"OMP_NUM_THREADS": "4"}}]}
    hosts = inventory.hosts(*names, engine="trtllm", **gpus, **variables)
    first, last = next(iter(hosts)), list(hosts)[-1]
    groups = inventory.groups(etcd=[first], nats=[first], frontend=[first], prefill=[first], decode=[last])
    settings = inventory.settings(engine="trtllm", kv_transfer_backend=backend)
    built = topology.build(groups, hosts, settings)
    return trtllm_proof.expected(built, hosts, inventory.common["kv_fabrics"], backend=backend, engine=ENGINE)


def test_each_worker_must_show_its_fabric_s_environment_its_port_and_what_its_entry_adds(inventory: Any) -> None:
    found = expected(inventory, "a", kv_fabric="pcie_single")
    assert found["decode-0"]["environment"]["OMP_NUM_THREADS"] == "4"
    for name in ("prefill-0", "decode-0"):
        assert found[name]["environment"]["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
        assert found[name]["environment"]["UCX_PROTO_INFO"] == "y"
        assert found[name]["promised"] == ["cuda_ipc"]
        wanted = {"backend": "NIXL", "max_tokens_in_buffer": 4096, "kv_transfer_timeout_ms": 60000}
        assert found[name]["transceiver"] == wanted
    ports = {found[name]["environment"]["TRTLLM_NIXL_PORT"] for name in found}
    assert len(ports) == 2


def test_what_is_promised_depends_on_where_the_peers_are(inventory: Any) -> None:
    devices = {"kv_fabric": "ib", "kv_net_devices": ["mlx5_0:1"]}
    assert "cuda_ipc" in expected(inventory, "a", **devices)["decode-0"]["promised"]
    apart = expected(inventory, "a", "b", **devices)["decode-0"]
    assert apart["promised"] == ["rc_verbs", "rc_mlx5"]
    assert apart["environment"]["UCX_NET_DEVICES"] == "mlx5_0:1"


def test_a_running_process_s_environment_is_judged_variable_by_variable() -> None:
    wanted = {"UCX_TLS": "rc,cuda,self", "TRTLLM_UCX_INTERFACE": "eth0"}
    good = "UCX_TLS=rc,cuda,self\nTRTLLM_UCX_INTERFACE=eth0\nUCX_MODULE_DIR=/usr/local/ucx/lib/ucx\nPATH=/bin\n"
    assert trtllm_proof.environment_problems(wanted, trtllm_proof.environment(good)) == []
    for line, word in (
        ("UCX_TLS=tcp", "'tcp', wanted 'rc,cuda,self'"),
        ("TRTLLM_USE_UCX_KVCACHE=1", "TRTLLM_USE_UCX_KVCACHE"),
        ("UCX_RNDV_THRESH=0", "does not name it"),
    ):
        (problem,) = trtllm_proof.environment_problems(wanted, trtllm_proof.environment(good + line))
        assert word in problem
    assert trtllm_proof.environment_problems(wanted, {}) != []


def test_the_processes_of_a_container_are_those_below_its_first() -> None:
    listed = (
        "PID   PPID  COMMAND\n10    1     /usr/bin/containerd-shim\n20    10    bash entrypoint python3 -m x\n"
        "22    21    python3 -m mpi4py.futures.server\n21    20    python3 -m dynamo.trtllm --a b\n"
        "30    10    python3 -S -E -c health\n"
    )
    assert [pid for pid, _ in trtllm_proof.descendants(listed, 20)] == [20, 22, 21]


@pytest.mark.parametrize(
    ("transport", "promised", "fix"),
    [
        ("sysv/memory", ["cuda_ipc"], "pcie_single"),
        ("tcp/eth0", ["cuda_ipc"], "pid_mode: host"),
        ("tcp/eth0", ["rc_mlx5"], "/dev/infiniband"),
        ("rc_mlx5/mlx5_0:1", ["cuda_ipc"], "nvlink_domains"),
        ("tcp/eth0", ["gga"], "docs/fabrics.md"),
    ],
)
def test_another_transport_than_the_promised_is_an_error_with_a_likely_cause(
    transport: str, promised: list[str], fix: str
) -> None:
    wanted = {"promised": promised, "fabric": "mine"}
    (problem,) = trtllm_proof.log_problems("decode-0", "decode", UCX + table(transport), wanted, "ucx")
    assert problem.found == f"transport {transport.partition('/')[0]}"
    assert fix in problem.fix


def test_a_log_as_the_inventory_wants_it_is_fine_and_the_other_backend_is_not() -> None:
    wanted = {"promised": ["cuda_ipc"], "fabric": "mine"}
    assert trtllm_proof.log_problems("d", "decode", NIXL + table("cuda_ipc/cuda"), wanted, "nixl") == []
    (problem,) = trtllm_proof.log_problems("d", "decode", UCX + table("cuda_ipc/cuda"), wanted, "nixl")
    assert (problem.found, problem.wanted) == ("ucx", "kv_transfer_backend: nixl")
    (problem,) = trtllm_proof.log_problems("d", "decode", "", wanted, "ucx")
    assert problem.found == "nothing in its log"


def test_a_misspelt_variable_in_the_log_is_an_error_and_a_missing_gpu_is_not() -> None:
    wanted = {"promised": list(fabrics.ALIASES["cuda"]), "fabric": "mine"}
    line = "[1.1] [h:1:0]  parser.c:2359 UCX  WARN  unused environment variable: {}\n"
    assert trtllm_proof.log_problems("d", "decode", UCX + line.format("UCX_TSL"), wanted, "ucx")
    assert not trtllm_proof.log_problems("d", "decode", UCX + line.format("UCX_CUDA_IPC_CACHE"), wanted, "ucx")


def test_requests_are_counted_by_component_and_endpoint() -> None:
    def text(component: str, value: int, endpoint: str = "generate") -> str:
        labels = f'dynamo_component="{component}",dynamo_endpoint="{endpoint}",dynamo_namespace="x"'
        return f"dynamo_component_requests_total{{{labels}}} {value}\n"

    workers = [{"name": "p", "role": "prefill"}, {"name": "d", "role": "decode"}]
    before = {"p": text("prefill", 3), "d": text("tensorrt_llm", 7)}
    after = {"p": text("prefill", 5) + text("prefill", 9, "clear_kv_blocks"), "d": text("tensorrt_llm", 7)}
    assert trtllm_proof.counted(before, after, workers) == {"prefill": 2, "decode": 0}


@pytest.mark.parametrize(("buffer", "context"), [(256, 2048), (8192, 2048), (8192, 131072)])
def test_the_prompts_fit_the_model_and_lie_around_the_buffer_s_limit(buffer: int, context: int) -> None:
    found = trtllm_proof.prompt_lengths(buffer, context)
    near, beyond = found["near the limit"], found["beyond the buffer"]
    assert near is not None
    assert near < buffer
    assert near + trtllm_proof.ANSWER_TOKENS < context
    assert beyond == (buffer + 1 if buffer < context - 10 else None)
