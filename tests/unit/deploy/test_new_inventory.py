from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pdstack.deploy import new_inventory

RACK = ["--hosts", "g1=10.0.0.1,g2=10.0.0.2", "--fabric", "ib", "--net-devices", "mlx5_0:1"]


def make(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the inventory `rack` and return its hosts.yml and group_vars/all.yml."""
    assert new_inventory.main(["rack", *arguments, "--directory", str(folder)]) == 0
    texts = [(folder / "rack" / name).read_text() for name in ("hosts.yml", "group_vars/all.yml")]
    hosts, settings = [yaml.safe_load(text) for text in texts]
    return hosts["all"], settings


def workers(hosts: dict[str, Any], role: str) -> dict[str, list[list[int]]]:
    named = {host: (variables or {}).get(f"{role}_workers", []) for host, variables in hosts["hosts"].items()}
    return {host: [entry["gpus"] for entry in entries] for host, entries in named.items() if entries}


def members(hosts: dict[str, Any], group: str) -> list[str]:
    return list(hosts["children"][group]["hosts"])


def test_roles_are_spread_over_the_hosts(tmp_path: Path) -> None:
    hosts, settings = make(
        tmp_path, *RACK, "--prefill", "2", "--decode", "2", "--tp-prefill", "4", "--tp-decode", "4", "--backend", "nixl"
    )
    assert workers(hosts, "prefill") == {"g1": [[0, 1, 2, 3]], "g2": [[0, 1, 2, 3]]}
    assert workers(hosts, "decode") == {"g1": [[4, 5, 6, 7]], "g2": [[4, 5, 6, 7]]}
    assert hosts["hosts"]["g1"]["kv_net_devices"] == ["mlx5_0:1"]
    assert hosts["hosts"]["g2"]["ansible_host"] == "10.0.0.2"
    assert (settings["kv_fabric"], settings["kv_transfer_backend"]) == ("ib", "nixl")
    assert len(members(hosts, "etcd")) == 1
    assert members(hosts, "frontend") == ["g1", "g2"]


def test_services_go_to_hosts_without_workers_first(tmp_path: Path) -> None:
    hosts, _ = make(tmp_path, *RACK, "--service-hosts", "c1,c2,c3", "--prefill", "1", "--decode", "1")
    assert members(hosts, "etcd") == members(hosts, "nats") == ["c1", "c2", "c3"]
    assert members(hosts, "frontend") == ["c1", "c2"]
    assert "gpu_count" not in (hosts["hosts"]["c1"] or {})


def test_one_host_takes_the_fabric_of_one_host(tmp_path: Path) -> None:
    hosts, settings = make(tmp_path, "--hosts", "box", "--gpus-per-host", "2", "--prefill", "1", "--decode", "1")
    assert settings["kv_fabric"] == "nvlink_single"
    assert workers(hosts, "prefill") == {"box": [[0]]}
    assert workers(hosts, "decode") == {"box": [[1]]}


def test_the_largest_workers_are_placed_first(tmp_path: Path) -> None:
    # The other way round the small ones would leave 6 GPUs on each host.
    hosts, _ = make(tmp_path, *RACK, "--prefill", "2", "--tp-prefill", "2", "--decode", "1", "--tp-decode", "8")
    assert [len(gpus) for lists in workers(hosts, "decode").values() for gpus in lists] == [8]
    assert sum(map(len, workers(hosts, "prefill").values())) == 2


def test_a_directory_is_a_model_and_a_prebuilt_image_is_pulled(tmp_path: Path) -> None:
    image = "registry.site/ai/runtime:0.7.0.post1"
    _, settings = make(tmp_path, *RACK, "--prefill", "1", "--decode", "1", "--model", "/srv/Llama-8B", "--image", image)
    assert (settings["model_source"], settings["model_ref"], settings["model_name"]) == (
        "path", "/srv/Llama-8B", "llama-8b",
    )  # fmt: skip
    assert (settings["trtllm_image_source"], settings["trtllm_image"]) == ("registry", image)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prefill", "3", "--decode", "2", "--tp-decode", "8"], "19 wanted (3 prefill workers of 1 and 2 decode"),
        (["--prefill", "1", "--decode", "1", "--tp-decode", "16"], "at most 8, the GPUs of a host"),
        (["--prefill", "3", "--decode", "1", "--tp-prefill", "5"], "every worker's GPUs on one host"),
        (["--prefill", "0", "--decode", "1"], "at least one of each"),
        (["--prefill", "1", "--decode", "1", "--etcd", "2"], "2 members lose their quorum as soon as 1 would"),
        (["--prefill", "1", "--decode", "1", "--nats", "2"], "2 servers lose their quorum as soon as 1 would"),
        (["--prefill", "1", "--decode", "1", "--etcd", "3"], "1 to 2, the hosts that are named"),
        (["--prefill", "1", "--decode", "1", "--fabric", "nvlink_single"], "all workers on one host"),
        (["--prefill", "1", "--decode", "1", "--fabric", "ibb"], "did you mean 'ib'"),
        (["--prefill", "1", "--decode", "1", "--fabric", "ib", "--net-devices", ""], "RDMA devices with their port"),
        (["--prefill", "1", "--decode", "1", "--fabric", ""], "what joins the hosts"),
        (["--prefill", "1", "--decode", "1", "--model", "a/b"], "a commit, 40 hex digits"),
        (["--prefill", "1", "--decode", "1", "--hosts", "g1,g1"], "twice: g1"),
        (["--prefill", "1", "--decode", "1", "--hosts", "g1=10.0.0.1,g2=10.0.0.1"], "one host behind an address"),
        (["--prefill", "1", "--decode", "1", "--hosts", "g1: {x}"], "names of letters, digits"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new_inventory.main(["rack", *RACK, *arguments, "--directory", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert all(word in said for word in ("found:", "wanted:", "fix:"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rack", "cluster", "Rack!", "../rack"])
def test_a_name_that_is_taken_or_none_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rack").mkdir()
    assert new_inventory.main([name, *RACK, "--prefill", "1", "--decode", "1", "--directory", str(tmp_path)]) == 1
    assert "choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rack"]


def test_it_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, *RACK, "--prefill", "1", "--decode", "1")
    said = capsys.readouterr().out
    assert "nox -s doctor -- -i" in said
    assert "--check" in said
