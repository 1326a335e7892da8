from __future__ import annotations

import itertools
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml
from tests.unit.deploy import consumers

from pdstack.deploy import service, topology, trtllm

FABRIC = {"pid_mode": "host", "ipc_mode": "host", "gpu_visibility": "all", "ulimits": ["memlock:-1:-1"]}


NODES = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-caps"]


class Deployment:
    """Two GPU hosts with a prefill worker of two GPUs and two decode workers of one."""

    def __init__(self, inventory: Any, **settings: Any) -> None:
        self.settings = inventory.settings(
            pdstack_name="t", engine="trtllm", model_source="path", model_ref="/models/m", **settings
        )
        self.hosts = {
            "a": {"pdstack_address": "10.0.0.1", "gpu_count": 2, "prefill_workers": [{"gpus": [0, 1]}]},
            "b": {"pdstack_address": "10.0.0.2", "gpu_count": 2, "decode_workers": [{"gpus": [0]}, {"gpus": [1]}]},
        }
        self.groups = inventory.groups(decode=["b"])

    @property
    def topology(self) -> topology.Topology:
        return topology.build(self.groups, self.hosts, self.settings)

    def entry(self, name: str) -> topology.Worker:
        return next(worker for worker in self.topology["workers"] if worker["name"] == name)

    def config(self, name: str) -> dict[str, Any]:
        entry = self.entry(name)
        return trtllm.engine_config(
            entry["role"], entry["engine"], len(entry["gpus"]), defaults=self.settings["trtllm_engine_defaults"],
            site=self.settings["trtllm_engine"], backend=self.settings["kv_transfer_backend"],
            max_input_tokens=self.settings["trtllm_max_input_tokens"],
            timeout_ms=self.settings["kv_transfer_timeout_ms"],
        )  # fmt: skip

    def spec(self, name: str, **changed: Any) -> dict[str, Any]:
        known: dict[str, Any] = {
            "image": "runtime:1", "version": "0.7", "namespace": "t", "model_name": "m", "model_dir": "/models/m",
            "options": self.settings["trtllm_args"], "router_mode": self.settings["router_mode"], "migration_limit": 3,
            "backend": self.settings["kv_transfer_backend"], "fabric": FABRIC,
            "fabric_env": {"UCX_TLS": "cuda,sm,self"},
            "gpu_mode": "runtime", "gpu_devices": NODES,
        }  # fmt: skip
        return trtllm.worker(self.entry(name), self.topology, self.config(name), **known | changed)


WORKERS = ("prefill-0", "decode-0", "decode-1")


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_a_service_that_the_service_role_takes(name: str, inventory: Any) -> None:
    spec = Deployment(inventory).spec(name)
    assert service.errors(spec, "t") == []
    plan = service.plan(spec, deployment="t", config_dir="/etc/pdstack/t", data_dir="/var/lib/pdstack/t", uid=64000)
    assert (plan["user"], plan["owner"]) == ("1000:0", 1000)
    assert plan["container"] == f"pdstack-t-{name}"


@pytest.mark.parametrize("name", WORKERS)
@pytest.mark.parametrize("backend", ["ucx", "nixl"])
def test_the_engine_takes_its_settings(name: str, backend: str, inventory: Any) -> None:
    deployment = Deployment(inventory, kv_transfer_backend=backend)
    (file,) = deployment.spec(name)["files"]
    read = consumers.engine_arguments(file["content"])
    assert read["cache_transceiver_config"] == {
        "backend": backend.upper(), "max_tokens_in_buffer": 8192, "kv_transfer_timeout_ms": 60000,
    }  # fmt: skip
    assert read["disable_overlap_scheduler"] is (name == "prefill-0")
    assert read["tensor_parallel_size"] == len(deployment.entry(name)["gpus"])


def test_a_misspelt_key_is_what_the_engine_refuses(inventory: Any) -> None:
    deployment = Deployment(inventory, trtllm_engine={"decode": {"kv_cache_config": {"tokens_per_blok": 32}}})
    with pytest.raises(ValueError, match="tokens_per_blok"):
        consumers.engine_arguments(deployment.spec("decode-0")["files"][0]["content"])


@pytest.mark.parametrize("name", WORKERS)
def test_dynamo_takes_the_command_and_says_what_the_engine_s_file_says(name: str, inventory: Any) -> None:
    deployment = Deployment(
        inventory, router_mode="kv",
        trtllm_engine={"common": {"max_seq_len": 9000, "kv_cache_config": {"tokens_per_block": 64}}},
        trtllm_args={"dyn_reasoning_parser": "deepseek_r1", "max_file_size_mb": 7},
    )  # fmt: skip
    config, role = deployment.config(name), deployment.entry(name)["role"]
    read = consumers.worker_options(deployment.spec(name)["command"])
    assert (read["namespace"], read["component"], read["endpoint"]) == (
        "t", {"prefill": "prefill", "decode": "tensorrt_llm"}[role], "generate",
    )  # fmt: skip
    assert read["disaggregation_mode"] == role
    assert (read["model_path"], read["served_model_name"]) == ("/models/m", "m")
    assert read["kv_block_size"] == config["kv_cache_config"]["tokens_per_block"] == 64
    for key in ("tensor_parallel_size", "pipeline_parallel_size", "max_batch_size", "max_num_tokens", "max_seq_len"):
        assert read[key] == config[key], key
    assert read["gpus_per_node"] == len(deployment.entry(name)["gpus"])
    assert read["extra_engine_args"] == "/etc/pdstack/engine.yaml"
    assert read["publish_events_and_metrics"] is (role == "prefill")
    assert (read["reasoning_parser"], read["max_file_size_mb"], read["migration_limit"]) == (
        "deepseek_r1", 7, 3 if role == "decode" else 0,
    )  # fmt: skip


def test_a_misspelt_option_fails_in_the_real_parser(inventory: Any) -> None:
    command = Deployment(inventory, trtllm_args={"migration_limits": 1}).spec("decode-0")["command"]
    with pytest.raises(ValueError, match="unrecognized arguments: --migration-limits"):
        consumers.worker_options(command)


def test_the_image_s_choice_of_a_backend_is_taken_away(inventory: Any) -> None:
    command = Deployment(inventory).spec("decode-0")["command"]
    assert command[0] == "env"
    unset = {word for before, word in itertools.pairwise(command) if before == "-u"}
    assert {"TRTLLM_USE_UCX_KVCACHE", "TRTLLM_USE_NIXL_KVCACHE", "TRTLLM_USE_MPI_KVCACHE"} <= unset
    assert command.index("python3") > max(position for position, word in enumerate(command) if word == "-u")


def test_the_environment_says_where_the_worker_belongs(inventory: Any) -> None:
    env = Deployment(inventory).spec("decode-1")["env"]
    assert env["ETCD_ENDPOINTS"] == "http://10.0.0.1:2379"
    assert env["NATS_SERVER"] == "nats://10.0.0.1:4222"
    assert (env["DYN_SYSTEM_HOST"], env["DYN_SYSTEM_PORT"]) == ("10.0.0.2", "9151")
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["UCX_TLS"] == "cuda,sm,self"
    assert not any(key.startswith("TRTLLM_USE_") for key in env)


def test_every_worker_of_a_host_has_ports_of_its_own_for_nixl(inventory: Any) -> None:
    deployment = Deployment(inventory, kv_transfer_backend="nixl")
    ports = [int(deployment.spec(name)["env"]["TRTLLM_NIXL_PORT"]) for name in ("decode-0", "decode-1")]
    assert ports[1] - ports[0] >= len(deployment.entry("decode-0")["gpus"])
    assert "TRTLLM_NIXL_PORT" not in Deployment(inventory).spec("decode-0")["env"]


def test_the_container_follows_the_fabric(inventory: Any) -> None:
    spec = Deployment(inventory).spec("prefill-0")
    assert (spec["pid_mode"], spec["ipc_mode"], spec["shm_size"]) == ("host", "host", "10g")
    assert "memlock:-1:-1" in spec["ulimits"]
    assert spec["gpus"] == {
        "ids": [0, 1], "mode": "runtime", "visible": "all",
        "devices": ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"],
    }  # fmt: skip
    own = Deployment(inventory).spec("decode-1", fabric=FABRIC | {"gpu_visibility": "own"})
    assert own["gpus"]["devices"] == ["/dev/nvidia1", "/dev/nvidiactl"]


@pytest.mark.parametrize(("memlock", "wanted"), [("-1", "memlock:-1:-1"), ("8388608", "memlock:8388608:8388608")])
def test_the_limit_of_locked_memory_is_a_setting(memlock: str, wanted: str) -> None:
    assert wanted in trtllm.ulimits(["memlock:-1:-1"], memlock)
    assert any(limit.startswith("nofile:") for limit in trtllm.ulimits([], memlock))


def test_an_engine_that_may_not_raise_limits_is_asked_for_none() -> None:
    assert trtllm.ulimits(["memlock:-1:-1"], "") == []


def test_layers_lie_over_each_other_key_by_key(inventory: Any) -> None:
    deployment = Deployment(
        inventory,
        trtllm_engine={
            "common": {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}},
            "decode": {"max_batch_size": 8, "cuda_graph_config": None},
        },
    )
    deployment.hosts["b"]["decode_workers"][1]["engine"] = {"kv_cache_config": {"free_gpu_memory_fraction": 0.25}}
    first, second, prefill = (deployment.config(name) for name in ("decode-0", "decode-1", "prefill-0"))
    assert [config["kv_cache_config"]["free_gpu_memory_fraction"] for config in (first, second, prefill)] == [
        0.5, 0.25, 0.5,
    ]  # fmt: skip
    assert second["kv_cache_config"]["tokens_per_block"] == 32
    assert (first["max_batch_size"], prefill["max_batch_size"]) == (8, 64)
    assert first["cuda_graph_config"] is None
    assert deployment.settings["trtllm_engine_defaults"]["decode"]["cuda_graph_config"] == {"max_batch_size": 64}


def test_pipeline_stages_take_their_part_of_the_gpus(inventory: Any) -> None:
    deployment = Deployment(inventory, trtllm_engine={"prefill": {"pipeline_parallel_size": 2}})
    config = deployment.config("prefill-0")
    assert (config["tensor_parallel_size"], config["pipeline_parallel_size"]) == (1, 2)


def test_the_engine_s_file_is_yaml_without_surprises(inventory: Any) -> None:
    deployment = Deployment(inventory)
    text = deployment.spec("decode-0")["files"][0]["content"]
    assert yaml.safe_load(text) == deployment.config("decode-0")
    assert "*" not in text


def frontend(deployment: Deployment, **changed: Any) -> Any:
    known: dict[str, Any] = {
        "image": "i:1", "version": "0.7", "namespace": "t", "model_name": "m", "model_dir": "/models/m",
        "router_mode": "random", "block_size": 32,
    }  # fmt: skip
    return trtllm.frontend(deployment.topology["frontends"][0], deployment.topology, **known | changed)


@pytest.mark.parametrize("router_mode", ["random", "kv", "round-robin"])
def test_dynamo_takes_the_frontend_s_command(router_mode: str, inventory: Any) -> None:
    deployment = Deployment(inventory)
    deployment.hosts["b"]["pdstack_address"] = "10.0.0.2"
    deployment.groups["frontend"] = ["a", "b"]
    spec = frontend(deployment, router_mode=router_mode)
    read = consumers.frontend_options(spec["command"])
    assert (read["http_host"], read["http_port"], read["namespace"]) == ("10.0.0.1", 8000, "t")
    assert read["enforce_disagg"] is True
    assert (read["router_mode"], read["kv_cache_block_size"]) == (router_mode, 32 if router_mode == "kv" else None)
    assert read["router_replica_sync"] is (router_mode == "kv")
    assert spec["user"] == "1000:0"
    assert spec["volumes"] == ["/models/m:/models/m:ro"]
    assert service.errors(spec, "t") == []


def test_a_misspelt_option_of_the_frontend_fails_in_the_real_parser(inventory: Any) -> None:
    command = frontend(Deployment(inventory))["command"]
    with pytest.raises(ValueError, match="unrecognized arguments: --enforce-disaggregation"):
        consumers.frontend_options([*command, "--enforce-disaggregation"])


@pytest.mark.parametrize("backend", ["ucx", "nixl"])
def test_profiles_of_the_fabric_reach_the_container(backend: str, inventory: Any) -> None:
    deployment = Deployment(inventory, kv_transfer_backend=backend)
    entry = deployment.entry("decode-0")
    spec = trtllm.rendered(
        entry, deployment.topology, defaults=deployment.settings["trtllm_engine_defaults"], site={},
        max_input_tokens=8192, timeout_ms=60000, backend=backend, fabric=inventory.common["kv_fabrics"]["ib"],
        host={"kv_net_devices": ["mlx5_0:1"], "kv_interface": "eth1"}, image="i:1", version="0.7", namespace="t",
        model_name="m", model_dir="/m", options={}, router_mode="random", migration_limit=0, gpu_mode="cdi",
    )  # fmt: skip
    assert spec["env"]["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert spec["env"][f"TRTLLM_{backend.upper()}_INTERFACE"] == "eth1"
    assert spec["env"]["UCX_PROTO_INFO"] == "y"
    assert (spec["devices"], spec["pid_mode"], spec["gpus"]["visible"]) == (["/dev/infiniband"], "host", "all")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_wants_200_with_the_image_s_python_alone(status: int, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    found = trtllm.health_check(f"http://127.0.0.1:{server.server_address[1]}/health", start_period="1800s")
    assert found["test"][:2] == ["CMD", "python3"]
    done = subprocess.run(found["test"][1:], check=False, capture_output=True, timeout=20)
    server.shutdown()
    server.server_close()
    assert (done.returncode == 0) is healthy


def test_values_of_an_inventory_are_of_other_types() -> None:
    class Tagged(str):
        pass

    assert trtllm.engine_yaml({"backend": Tagged("pytorch"), "nested": {"dtype": Tagged("auto")}}) == (
        "backend: pytorch\nnested:\n  dtype: auto\n"
    )


def test_a_change_of_backend_changes_workers_and_nothing_else(inventory: Any) -> None:
    ucx, nixl = (frontend(Deployment(inventory, kv_transfer_backend=backend)) for backend in ("ucx", "nixl"))
    assert ucx == nixl
    assert Deployment(inventory).spec("decode-0") != Deployment(inventory, kv_transfer_backend="nixl").spec("decode-0")


def test_requests_in_flight_are_added_up_over_endpoints() -> None:
    text = (
        "# HELP dynamo_component_inflight_requests x\n# TYPE dynamo_component_inflight_requests gauge\n"
        'dynamo_component_inflight_requests{dynamo_endpoint="generate"} 2\n'
        'dynamo_component_inflight_requests{dynamo_endpoint="other"} 1\n'
        'dynamo_component_requests_total{dynamo_endpoint="generate"} 7\n'
    )
    assert trtllm.inflight(text) == 3
    assert trtllm.inflight("") == 0


def test_workers_that_run_are_asked_where_their_environment_says() -> None:
    def container(name: str, running: bool, *env: str) -> dict[str, Any]:
        return {"Name": f"/{name}", "State": {"Running": running}, "Config": {"Env": [*env]}}

    at = ("DYN_SYSTEM_HOST=fd00::1", "DYN_SYSTEM_PORT=9100")
    found = trtllm.answering([container("a", True, *at), container("b", False, *at), container("c", True, "X=1")])
    assert found == [{"name": "a", "url": "http://[fd00::1]:9100"}]
