from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from pdstack.deploy import ask

STATUS_PORTS = {"prefill-0": 9100, "decode-0": 9150}
WORKERS = tuple(STATUS_PORTS)
workers = pytest.mark.parametrize("worker", WORKERS)


@workers
def test_it_is_confined_and_healthy(
    worker: str, is_confined: Callable[[str], bool], check_health: Callable[[str], bool]
) -> None:
    assert is_confined(worker)
    assert check_health(worker)


@workers
def test_it_says_that_it_can_serve(worker: str, at: Callable[..., str]) -> None:
    health = ask.get_json(at(STATUS_PORTS[worker], "/health"))
    assert health["status"] == "ready"
    assert (health["name"], health["role"]) == (worker, worker.split("-")[0])


@workers
def test_the_cluster_key_is_for_the_worker_alone(worker: str, host: Host) -> None:
    key = host.file(f"/etc/pdstack/molecule/{worker}/cluster.key")
    assert (key.uid, key.mode) == (64000, 0o400)
    assert key.content_string.strip() not in host.check_output(f"docker container inspect pdstack-molecule-{worker}")


@workers
def test_the_fabric_profile_reached_the_container(
    worker: str, host: Host, container: Callable[[str], dict[str, Any]]
) -> None:
    found = container(worker)
    assert found["HostConfig"]["PidMode"] == "host"
    assert "UCX_TLS=cma,tcp,self" in found["Config"]["Env"]
    config = json.loads(host.file(f"/etc/pdstack/molecule/{worker}/worker.json").content_string)
    assert config["role"] == worker.split("-")[0]
    assert (config["transfer"]["backend"], config["transfer"]["path"]) == ("ucx", "auto")


def test_a_request_goes_through_prefill_and_decode_and_is_on_record(host: Host, at: Callable[..., str]) -> None:
    answer = ask.complete(at(8000), "tiny", list(range(1, 41)), 6)
    assert answer.good, answer.problem()
    record = ask.get_json(at(STATUS_PORTS["decode-0"], f"/requests/{answer.request_id}"))
    assert record["prompt_tokens"] == 40
    assert len(record["token_ids"]) == 6
    assert record["transfer"]["bytes"] > 0
    # Whichever of the profile's own paths the step kv_path found to be the better one.
    assert record["transfer"]["transport"] in ("shared", "cma")
    assert ask.get_json(at(STATUS_PORTS["prefill-0"], f"/requests/{answer.request_id}"))["role"] == "prefill"
    # Where it outlives the container. Prefill writes when decode has said that it is done, so soon, not at once.
    for worker, event in (("prefill-0", "export"), ("decode-0", "transfer")):
        limit = time.monotonic() + 10
        while not recorded(host, worker, event, answer.request_id):
            assert time.monotonic() < limit, f"{worker} has no record of the {event}"
            time.sleep(0.2)


def recorded(host: Host, worker: str, event: str, request: str) -> bool:
    file = host.file(f"/var/lib/pdstack/molecule/{worker}/kv-audit.jsonl")
    assert file.uid == 64000
    records = map(json.loads, file.content_string.splitlines())
    return any(
        (record["event"], record.get("verdict")) == (event, "ok") and record["request"].startswith(request)
        for record in records
    )


def test_prefill_listens_for_the_path_stream_where_the_topology_says(host: Host) -> None:
    assert host.socket(f"tcp://{host.interface('eth0').addresses[0]}:14300").is_listening
