from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from pdstack.deploy import ask


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


def test_it_is_confined_and_healthy(is_confined: Callable[[str], bool], check_health: Callable[[str], bool]) -> None:
    assert is_confined("frontend")
    assert check_health("frontend")


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


def test_it_listens_on_its_address_alone(host: Host, address: str) -> None:
    assert host.socket(f"tcp://{address}:13000").is_listening
    assert not host.socket("tcp://0.0.0.0:13000").is_listening
