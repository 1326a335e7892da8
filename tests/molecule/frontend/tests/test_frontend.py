from __future__ import annotations

import base64
import shlex
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.backend.base import CommandResult
from testinfra.host import Host

from pdstack.deploy import ask, prove


@pytest.fixture(scope="module", autouse=True)
def up(at: Callable[..., str]) -> None:
    """It takes a moment to listen."""
    deadline = time.monotonic() + 30
    while True:
        try:
            ask.get(at(8000, "/health"))
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def check(host: Host, container: Callable[[str], dict[str, Any]]) -> CommandResult:
    """Run the container's own health check now."""
    command = container("frontend")["Config"]["Healthcheck"]["Test"]
    return host.run(f"docker exec pdstack-molecule-frontend {shlex.join(command[1:])}")


def test_it_is_confined(is_confined: Callable[[str], bool]) -> None:
    assert is_confined("frontend")


def test_it_is_not_well_while_no_worker_is_registered(host: Host, container: Callable[[str], dict[str, Any]]) -> None:
    done = check(host, container)
    assert done.rc == 1
    assert "lists no model, wanted tiny" in done.stderr
    assert "etcd has no card of a decode worker: look at the workers" in done.stderr


def test_it_never_lets_decode_do_the_work_of_prefill(container: Callable[[str], dict[str, Any]]) -> None:
    assert "--enforce-disagg" in container("frontend")["Config"]["Cmd"]


def test_it_sees_the_model_s_files_where_the_workers_will_name_them(
    host: Host, container: Callable[[str], dict[str, Any]]
) -> None:
    (mount,) = [m for m in container("frontend")["Mounts"] if m["Destination"].startswith("/var/lib/pdstack/models/")]
    assert mount["Source"] == mount["Destination"]
    assert not mount["RW"]
    assert host.run(f"docker exec pdstack-molecule-frontend ls {mount['Destination']}/tokenizer.json").rc == 0


def test_it_lists_models(at: Callable[..., str]) -> None:
    assert "data" in ask.get_json(at(8000, "/v1/models"))


def test_it_is_started_again_if_it_does_not_see_a_worker(
    host: Host, at: Callable[..., str], container: Callable[[str], dict[str, Any]]
) -> None:
    config = container("frontend")["Config"]
    namespace = config["Cmd"][config["Cmd"].index("--namespace") + 1]
    # Not a card that a frontend could read, so it stays unseen.
    key = base64.b64encode(f"v1/mdc/{namespace}/backend/generate/1".encode()).decode()
    prove.etcd_call(at(2379), "kv/put", {"key": key, "value": base64.b64encode(b"no card").decode()})
    ask_started = "docker inspect --format '{{.State.StartedAt}}' pdstack-molecule-frontend"
    started = host.check_output(ask_started)
    try:
        done = check(host, container)
        assert "etcd has the card of 1 worker(s), unseen by this frontend for 0 s" in done.stderr
        host.check_output("docker exec pdstack-molecule-frontend sh -c 'echo -1000 > /tmp/pdstack-worker-missed'")
        assert "it is started again" in check(host, container).stderr
        deadline = time.monotonic() + 60
        while host.check_output(ask_started) == started:
            assert time.monotonic() < deadline, "the frontend goes on"
            time.sleep(0.5)
    finally:
        prove.etcd_call(at(2379), "kv/deleterange", {"key": key})
    assert "it is started again" in host.check_output("docker logs pdstack-molecule-frontend 2>&1")


def test_it_listens_on_its_address_alone(host: Host, address: str) -> None:
    assert host.socket(f"tcp://{address}:13000").is_listening
    assert not host.socket("tcp://0.0.0.0:13000").is_listening
