from __future__ import annotations

import json

import pytest
from testinfra.host import Host


@pytest.fixture(scope="module")
def result(pytestconfig: pytest.Config) -> dict:
    return json.loads((pytestconfig.rootpath / ".pdstack/molecule/kv_path.json").read_text())


def test_every_path_of_the_fabric_was_measured_with_the_blocks_of_the_model(result: dict) -> None:
    (pair,) = result["pairs"]
    paths = {one["path"]: one for one in pair["paths"]}
    assert list(paths) == ["shared", "cma", "stream", "ucx"]
    # The workers' own user, capabilities and namespaces: what works here works there.
    assert {path for path, one in paths.items() if one["error"] is None} == set(paths)
    assert paths["ucx"]["transport"] == "cma"
    # tiny: 2 layers, keys and values, 16 tokens, 2 heads of 16, 4 bytes
    assert result["measured"]["sizes"] == [size["block_bytes"] for size in paths["shared"]["sizes"]]
    assert pair["problems"] == [] and pair["worst_ratio"] > 0


def test_it_ran_as_a_worker_does(result: dict, host: Host) -> None:
    facts = result["pairs"][0]["prefill_facts"]
    assert facts["user"] == 64000
    assert facts["ucx"]["UCX_TLS"] == "cma,tcp,self"
    assert facts["boot"] == host.file("/proc/sys/kernel/random/boot_id").content_string.strip()


def test_nothing_of_it_is_left(host: Host) -> None:
    assert host.run("docker ps --all --quiet --filter name=kv-path").stdout == ""
    assert not host.run("ls -d /etc/pdstack/molecule/kv-path*").succeeded
