from __future__ import annotations

from typing import Any

import pytest

from pdstack.deploy import obstacles, topology

MODEL = {"weights_mib": 514, "kv_bytes_per_token": 46080, "disk_mib": 1200}


def survey(**changed: Any) -> dict[str, Any]:
    return {
        "listeners": [], "memory": {"total_mib": 16000, "available_mib": 12000}, "disk_mib": {"/m": 9000},
        "present": {"/m": False}, "containers": [],
    } | changed  # fmt: skip


def find(inventory: Any, **changed: Any) -> list[str]:
    built = topology.build(inventory.groups(), inventory.hosts(), inventory.settings(pdstack_name="t"))
    found = obstacles.find(
        survey(**changed), built, "a", engine=inventory.common["engine_defaults"], model=MODEL, model_dir="/m"
    )
    return [f"{problem.what}: {problem.found}" for problem in found]


def listener(**changed: Any) -> dict[str, Any]:
    return {
        "address": "0.0.0.0",
        "port": 8000,
        "pid": 7,
        "process": "nginx",
        "container": "",
        "deployment": "",
    } | changed


def test_an_empty_host_is_ready(inventory: Any) -> None:
    assert find(inventory) == []


def test_a_stranger_on_a_port_is_named(inventory: Any) -> None:
    assert find(inventory, listeners=[listener()]) == ["port 8000 for frontend: taken by process nginx (pid 7)"]


def test_a_container_on_a_port_is_named(inventory: Any) -> None:
    found = find(inventory, listeners=[listener(container="web", port=2379)])
    assert found == ["port 2379 for etcd (client): taken by container web, process nginx (pid 7)"]


def test_our_own_container_on_its_port_is_fine(inventory: Any) -> None:
    assert find(inventory, listeners=[listener(container="pdstack-t-frontend", deployment="t")]) == []


def test_a_port_that_moves_between_our_services_is_fine_but_not_that_of_another_deployment(inventory: Any) -> None:
    assert not find(inventory, listeners=[listener(container="pdstack-t-nats", deployment="t")])
    assert find(inventory, listeners=[listener(container="pdstack-t-x-nats", deployment="t-x")])


@pytest.mark.parametrize(("address", "taken"), [("127.0.0.1", True), ("::", True), ("10.0.0.5", False)])
def test_only_the_address_that_is_used_matters(inventory: Any, address: str, taken: bool) -> None:
    assert bool(find(inventory, listeners=[listener(address=address)])) is taken


def test_a_process_that_cannot_be_seen(inventory: Any) -> None:
    assert "may not look into" in find(inventory, listeners=[listener(pid=0, process="")])[0]


def test_memory_counts_pools_and_weights_once(inventory: Any) -> None:
    found = find(inventory, memory={"total_mib": 3000, "available_mib": 2000})
    # 2 workers x 1024 blocks x 16 tokens x 46,080 bytes = 1440 MiB; 514 MiB weights; 2 x 250 and 300 MiB beside them.
    assert found == ["memory for 2 workers: 2000 MiB available of 3000 MiB"]
    assert not find(inventory, memory={"total_mib": 3000, "available_mib": 1440 + 514 + 500 + 300})


def test_memory_in_use_by_ourselves_is_not_missing(inventory: Any) -> None:
    assert not find(inventory, memory={"total_mib": 3000, "available_mib": 100}, containers=["pdstack-t-etcd"])


def test_disk_matters_until_the_model_is_there(inventory: Any) -> None:
    assert find(inventory, disk_mib={"/m": 100}) == ["disk for the model on a: 100 MiB free at /m"]
    assert not find(inventory, disk_mib={"/m": 100}, present={"/m": True})


def test_text_is_empty_or_names_the_host(inventory: Any) -> None:
    assert obstacles.render([], "a") == ""
    problem = obstacles.Problem("port 1", "x", "y", "z")
    assert obstacles.render([problem], "h7").startswith("h7 is not ready")


def test_the_port_of_a_rank_is_one_of_the_deployment(inventory: Any) -> None:
    hosts = inventory.hosts(prefill_workers=[{"gpus": [0, 1]}], decode_workers=[{"gpus": [2]}])
    built = topology.build(inventory.groups(), hosts, inventory.settings(engine="trtllm", pdstack_name="t"))
    taken = survey(listeners=[listener(port=20001)])
    found = obstacles.find(taken, built, "a", engine={}, model={}, model_dir="/m")
    assert [problem.what for problem in found] == ["port 20001 for worker prefill-0 (rank 1)"]
