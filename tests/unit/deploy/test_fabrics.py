"""Every profile against the real UCX of the runtime image's version: names, values, transports; and what is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stub_library import library, wanted_symbols

from pdstack.deploy import fabrics, schema, ucx_log
from pdstack.deploy.problem import mapping

COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
PROFILES: dict[str, dict[str, Any]] = yaml.safe_load((COMMON / "fabrics.yml").read_text())["kv_fabrics"]
VERSIONS: dict[str, Any] = yaml.safe_load((COMMON / "versions.yml").read_text())["versions"]
DATA = Path(__file__).parent / "fixtures"
TRTLLM = [name for name, profile in PROFILES.items() if "trtllm" in profile["engines"]]
HOST = {"kv_net_devices": ["mlx5_0:1", "mlx5_1:1"], "kv_interface": "lo"}
NO_DEVICE = 100

Info = Callable[..., str]


@pytest.fixture(scope="session")
def ucx_info(tmp_path_factory: pytest.TempPathFactory) -> Info:
    """The wheel's ucx_info with its CUDA module loaded, by a driver that knows of no GPU."""
    found = importlib.util.find_spec("libucx")
    assert found is not None, "found no libucx; wanted the development environment (libucx-cu12)"
    assert found.submodule_search_locations
    root = Path(next(iter(found.submodule_search_locations)))
    driver = tmp_path_factory.mktemp("driver")
    modules = [root / "lib/ucx/libuct_cuda.so.0", root / "lib/ucx/libucm_cuda.so.0"]
    names = sorted({name for module in modules for name in wanted_symbols(module, ("cu", "nvml"))})
    for file in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (driver / file).write_bytes(library(file, names, NO_DEVICE))

    def run(*arguments: str, **environment: str) -> str:
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("UCX_", "LD_"))}
        libraries = {"LD_LIBRARY_PATH": f"{root / 'lib'}:{driver}"}
        done = subprocess.run(
            [str(root / "bin/ucx_info"), *arguments], env={**plain, **libraries, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def known(ucx_info: Info) -> set[str]:
    """Every variable that UCX 1.19.0 takes: this wheel's, and InfiniBand's, which it is built without."""
    return ucx_log.variables(ucx_info("-cf")) | set((DATA / "ucx_1.19_ib_variables.txt").read_text().split())


def environments() -> Iterator[tuple[str, str, str]]:
    for name, profile in PROFILES.items():
        for engine in profile["engines"]:
            for backend in fabrics.BACKENDS:
                yield name, engine, backend


def made(name: str, engine: str, backend: str) -> dict[str, str]:
    found = fabrics.environment(PROFILES[name], HOST, engine=engine, backend=backend, port=21000)
    return {key: value for key, value in found.items() if key.startswith("UCX_")}


def test_the_ucx_asked_is_the_runtime_image_s(ucx_info: Info) -> None:
    assert ucx_log.version(ucx_info("-v")) == VERSIONS["trtllm_runtime"]["ucx"]


@pytest.mark.parametrize(("name", "engine", "backend"), list(environments()))
def test_ucx_knows_every_variable_and_takes_every_value(
    name: str, engine: str, backend: str, ucx_info: Info, known: set[str]
) -> None:
    environment = made(name, engine, backend)
    assert environment.keys() <= known
    said = ucx_info("-cf", **environment)
    assert "Invalid value" not in said
    shown = dict(line.split("=", 1) for line in said.splitlines() if line.startswith("UCX_") and "=" in line)
    for key, value in environment.items():
        if key in shown and key not in ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE", "UCX_RNDV_FRAG_SIZE"):
            assert shown[key] == value, f"UCX reads {key} as {shown[key]}"


@pytest.mark.parametrize("key", ["UCX_NET_DEVICE", "UCX_CUDA_IPC_ENABLE_GETZCOPY", "UCX_IB_GDR", "UCX_TSL"])
def test_a_misspelt_variable_is_found(key: str, known: set[str], ucx_info: Info) -> None:
    assert key not in known
    said = ucx_info("-u", "r", "-w", UCX_TLS="tcp,self", **{key: "1"})
    assert any(line.startswith(f"unused environment variable: {key}") for line in ucx_log.complaints(said))


def test_a_wrong_value_is_found(ucx_info: Info) -> None:
    assert "Invalid value" in ucx_info("-cf", UCX_CUDA_IPC_ENABLE_GET_ZCOPY="perhaps")


@pytest.mark.parametrize("backend", fabrics.BACKENDS)
@pytest.mark.parametrize("name", [name for name in PROFILES if "reference" in PROFILES[name]["engines"]])
def test_profiles_without_gpus_start_here_without_a_word(name: str, backend: str, ucx_info: Info) -> None:
    assert ucx_log.complaints(ucx_info("-u", "r", "-w", **made(name, "reference", backend))) == []


@pytest.mark.parametrize("name", TRTLLM)
def test_of_the_gpu_profiles_only_what_this_machine_lacks_is_missed(name: str, ucx_info: Info) -> None:
    """GPU, RDMA: nothing else is in the way. Options of transports that are not there count as unused."""
    lines = ucx_log.complaints(ucx_info("-u", "r", "-w", **made(name, "trtllm", "ucx")))
    for line in lines:
        allowed = ("(set UCX_WARN", "transport 'cuda", "transports 'cuda", "transports 'rc'", "network device")
        unused = line.startswith("unused environment variable") and all(
            word.rstrip(";").startswith(("UCX_CUDA_", "UCX_IB_")) for word in line.split() if word.startswith("UCX_")
        )
        assert unused or line.startswith(allowed), line


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_has_the_schema_s_keys_and_no_contradiction(name: str) -> None:
    assert list(mapping(name, PROFILES[name], schema.FABRIC)) == []
    for engine in PROFILES[name]["engines"]:
        assert fabrics.problems(name, PROFILES[name], HOST, engine=engine) == []


@pytest.mark.parametrize("name", TRTLLM)
def test_nothing_falls_back_to_tcp(name: str) -> None:
    """Whatever a profile does not promise cannot be chosen, or (auto) is refused by verify."""
    allowed, promised = fabrics.allowed(PROFILES[name]), fabrics.promised(PROFILES[name], same_host=True)
    assert promised
    assert "tcp" not in promised or name == "tcp"
    assert allowed is None or "tcp" not in allowed or name == "tcp"
    assert allowed is None or "cuda_copy" in allowed
    assert not set(promised) & {"cuda_copy", "self", "rc", "cuda", "sm"}, "an alias is no transport that UCX prints"


@pytest.mark.parametrize("name", TRTLLM)
def test_where_gpus_read_each_other_containers_share_what_that_needs(name: str) -> None:
    container = fabrics.container(PROFILES[name])
    if "cuda_ipc" in fabrics.promised(PROFILES[name], same_host=True):
        assert (container["pid_mode"], container["ipc_mode"], container["gpu_visibility"]) == ("host", "host", "all")
    if PROFILES[name]["net_devices"] == "rdma":
        assert "/dev/infiniband" in container["devices"]
        assert "memlock:-1:-1" in container["ulimits"]


def test_the_host_s_devices_and_interface_are_added_for_the_backend_in_use_only() -> None:
    ib = fabrics.environment(PROFILES["ib"], HOST, engine="trtllm", backend="nixl", port=21005)
    assert ib["UCX_NET_DEVICES"] == "mlx5_0:1,mlx5_1:1"
    assert (ib["TRTLLM_NIXL_INTERFACE"], ib["TRTLLM_NIXL_PORT"]) == ("lo", "21005")
    assert "TRTLLM_UCX_INTERFACE" not in ib
    tcp = fabrics.environment(PROFILES["tcp"], HOST, engine="trtllm", backend="ucx", port=21005)
    assert (tcp["UCX_NET_DEVICES"], tcp["TRTLLM_UCX_INTERFACE"]) == ("lo", "lo")
    assert not {"TRTLLM_NIXL_INTERFACE", "TRTLLM_NIXL_PORT"} & tcp.keys()
    assert "UCX_NET_DEVICES" not in fabrics.environment(PROFILES["tcp"], {}, engine="trtllm", backend="ucx")


def test_the_reference_engine_gets_what_the_profile_says_and_nothing_of_gpus() -> None:
    for name in ("same_host", "tcp"):
        found = fabrics.environment(PROFILES[name], {}, engine="reference", backend="ucx", port=1)
        assert found == PROFILES[name]["env"]
    assert fabrics.promised(PROFILES["same_host"], same_host=True, engine="reference") == ("cma",)


def test_a_threshold_of_one_backend_never_reaches_the_other() -> None:
    profile = {**PROFILES["ib"], "gpu": {"ucx_env": {"UCX_RNDV_THRESH": "16K"}}}
    assert fabrics.problems("x", profile, HOST, engine="trtllm") == []
    found = {
        backend: fabrics.environment(profile, HOST, engine="trtllm", backend=backend) for backend in fabrics.BACKENDS
    }
    assert found["ucx"]["UCX_RNDV_THRESH"] == "16K"
    assert "UCX_RNDV_THRESH" not in found["nixl"]


def changed(name: str, **env: str) -> dict[str, Any]:
    return {**PROFILES[name], "env": {**PROFILES[name]["env"], **env}}


@pytest.mark.parametrize(
    ("profile", "host", "what", "fix"),
    [
        (PROFILES["ib"], {}, "kv_net_devices", "/sys/class/infiniband"),
        (PROFILES["ib"], {"kv_net_devices": ["mlx5_0"]}, "kv_net_devices", "port behind the device"),
        (PROFILES["ib_rails"], {"kv_net_devices": ["mlx5_0:1"]}, "kv_net_devices", "kv_fabric: ib"),
        (changed("ib", TRTLLM_USE_UCX_KVCACHE="1"), HOST, "TRTLLM_USE_UCX_KVCACHE", "kv_transfer_backend"),
        (changed("ib", LD_LIBRARY_PATH="/opt/nixl"), HOST, "LD_LIBRARY_PATH", "remove it"),
        (changed("ib", NIXL_PLUGIN_DIR="/opt/nixl"), HOST, "NIXL_PLUGIN_DIR", "remove it"),
        (changed("ib", UCX_RNDV_THRESH="0"), HOST, "UCX_RNDV_THRESH", "ucx_env"),
        (changed("ib", UCX_TLS="rc_mlx5,cuda,self"), HOST, "UCX_TLS", "write rc"),
        (changed("ib", UCX_TLS="rc,cuda_copy,cuda_ipc,self"), HOST, "UCX_TLS", "write cuda"),
        (changed("ib", UCX_TLS="rc,self"), HOST, "UCX_TLS", "add cuda"),
        (changed("ib", UCX_TLS="rc,cuda,tcp,self"), HOST, "UCX_TLS", "take tcp out"),
        (changed("ib", UCX_TLS="ud,cuda,self"), HOST, "transports", "add them to UCX_TLS"),
        ({**PROFILES["nvlink_single"], "pid_mode": "private"}, HOST, "pid_mode", "pid_mode: host"),
        ({**PROFILES["ib"], "ipc_mode": "private"}, HOST, "ipc_mode", "ipc_mode: host"),
    ],
)
def test_a_contradiction_is_refused_with_its_fix(
    profile: dict[str, Any], host: dict[str, Any], what: str, fix: str
) -> None:
    found = fabrics.problems("mine", profile, host, engine="trtllm", host="gpu-1")
    assert any(what in problem.what and fix in problem.fix for problem in found), found


@pytest.mark.parametrize(("name", "engine"), [("ib", "reference"), ("pcie_single", "reference")])
def test_a_profile_of_the_other_engine_is_refused(name: str, engine: str) -> None:
    (problem,) = fabrics.problems(name, PROFILES[name], HOST, engine=engine)
    assert "same_host or tcp" in problem.fix


@pytest.mark.parametrize("key", ["TRTLLM_USE_NIXL_KVCACHE", "TRTLLM_USE_UCX_KV_CACHE", "LD_PRELOAD", "UCX_RNDV_THRESH"])
def test_a_worker_s_own_variables_are_looked_at_too(key: str) -> None:
    (problem,) = fabrics.worker_problems("prefill_workers[0].env on a", {key: "1", "HF_HOME": "/x"})
    assert key in problem.what


@pytest.mark.parametrize(
    ("name", "path", "wanted"),
    [
        ("same_host", "auto", ["shared", "cma"]),
        ("same_host", "backend", ["cma"]),
        ("same_host", "shared", ["shared"]),
        ("tcp", "auto", ["shared", "stream", "tcp"]),
        ("tcp", "stream", ["stream"]),
        ("tcp", "cma", []),
    ],
)
def test_what_may_carry_kv_of_the_reference_engine(name: str, path: str, wanted: list[str]) -> None:
    assert fabrics.wanted(PROFILES[name], path) == wanted
    assert bool(fabrics.path_problems(name, PROFILES[name], path)) is (not wanted)


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if "reference" in profile["engines"]])
def test_a_profile_of_the_reference_engine_says_its_paths_and_floor(name: str) -> None:
    assert 0 < PROFILES[name]["floor"] < 1
    assert PROFILES[name]["paths"] and not fabrics.path_problems(name, PROFILES[name], "auto")
