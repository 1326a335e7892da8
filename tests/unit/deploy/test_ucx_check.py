from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pdstack.deploy import ucx_check

COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
PROFILES: dict[str, dict[str, Any]] = yaml.safe_load((COMMON / "fabrics.yml").read_text())["kv_fabrics"]
VERSION = "# Library version: 1.19.0\n"
WARN = "[1.1] [h:1:0] x.c:1 UCX  WARN  "
GPU = "".join(
    f"#      Transport: {name}\n" for name in ("self", "tcp", "sysv", "posix", "cma", "cuda_copy", "cuda_ipc")
)
IB = GPU + "#      Transport: rc_mlx5\n"
NO_GPU = "#      Transport: self\n#      Transport: tcp\n"


def judge(name: str, *, gpu: bool = True, **said: str) -> list[str]:
    answers = {"version": VERSION, "devices": IB, "worker": "", **said}
    found = ucx_check.ucx(PROFILES[name], answers, host="a", name=name, version="1.19.0", gpu=gpu)
    return [f"{problem.what}: {problem.found} | {problem.fix}" for problem in found]


@pytest.mark.parametrize("name", [name for name in PROFILES if "trtllm" in PROFILES[name]["engines"]])
def test_a_host_that_has_all_is_fine(name: str) -> None:
    assert judge(name) == []


def test_another_version_proves_nothing() -> None:
    (problem,) = judge("tcp", version="# Library version: 1.22.0\n")
    assert "1.22.0" in problem


@pytest.mark.parametrize(
    ("name", "said", "what"),
    [
        ("ib", {"devices": GPU}, "transports"),
        ("nvlink_single", {"devices": NO_GPU + "#      Transport: cuda_copy\n"}, "transports"),
        ("tcp", {"devices": NO_GPU}, "GPU memory"),
        ("tcp", {"worker": f"{WARN}unused environment variable: UCX_TSL (maybe: UCX_TLS?)"}, "spelling"),
        ("ib", {"worker": f"{WARN}network device 'mlx5_9:1' is not available, please use one or more of: x"}, "kv_net"),
        ("ib", {"worker": f"{WARN}transport 'rc' is not available, please use one or more of: tcp"}, "ibv_devinfo"),
        ("tcp", {"worker": f"{WARN}transport 'cuda' is not available, please use one or more of: tcp"}, "nvidia-smi"),
        ("ib", {"worker": f"{WARN.replace('WARN', 'ERROR')}mlx5_0: Couldn't enable GPUDirect RDMA."}, "nvidia_peermem"),
    ],
)
def test_what_a_host_lacks_is_told_with_the_fix(name: str, said: dict[str, str], what: str) -> None:
    assert any(what in text for text in judge(name, **said))


def test_options_of_a_transport_that_is_not_there_are_not_called_misspelt() -> None:
    told = judge("ib", devices=GPU, worker=f"{WARN}unused environment variable: UCX_IB_GPU_DIRECT_RDMA")
    assert len(told) == 1
    assert judge("ib", worker=f"{WARN}unused environment variable: UCX_IB_GPU_DIRECT_RDMA")


def test_a_host_of_a_laboratory_need_not_show_gpus_and_nothing_else_is_forgiven() -> None:
    missing = f"{WARN}transport 'cuda' is not available, please use one or more of: tcp"
    unused = f"{WARN}unused environment variable: UCX_CUDA_IPC_ENABLE_GET_ZCOPY"
    assert judge("pcie_single", gpu=False, devices=NO_GPU, worker=f"{missing}\n{unused}") == []
    assert judge("tcp", gpu=False, devices=NO_GPU, worker=f"{WARN}unused environment variables: UCX_CUDA_X; UCX_TSL")
    assert judge("ib", gpu=False, devices=NO_GPU)


def told(gpu: bool = True, **said: Any) -> list[str]:
    answers = {"version": "0.7.1", "ucx": "1.19.0", "plugins": ["UCX"], "plugin": "", **said}
    found = ucx_check.nixl(answers, host="a", version="0.7.1", ucx_version="1.19.0", gpu=gpu)
    return [f"{problem.what} {problem.found}" for problem in found]


def test_nixl_is_the_runtime_image_s_and_loads() -> None:
    assert told() == []
    assert "0.8.0" in told(version="0.8.0")[0]
    assert "1.21.0" in told(ucx="1.21.0")[0]
    error = "libcuda.so.1: cannot open shared object file: No such file or directory"
    assert "libcuda" in told(plugin=error)[0]
    assert told(plugin=error, gpu=False) == []
    assert told(plugin="undefined symbol: nixlDescList", gpu=False)
