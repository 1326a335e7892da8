from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from testinfra.host import Host

CONFIG = "/etc/pdstack/molecule/web"
DATA = "/var/lib/pdstack/molecule/web"
PAGE = "python3 -c \"import urllib.request as u; print(u.urlopen('http://127.0.0.1:13990/page.txt').read().decode())\""


def test_it_is_confined(is_confined: Callable[[str], bool]) -> None:
    assert is_confined("web")


def test_it_is_healthy(check_health: Callable[[str], bool]) -> None:
    assert check_health("web")


def test_it_serves_its_file(host: Host) -> None:
    assert host.check_output(PAGE).strip() == "first"


def test_files_belong_to_the_container_and_secrets_to_it_alone(host: Host) -> None:
    for name, mode in (("page.txt", 0o440), ("token", 0o400)):
        file = host.file(f"{CONFIG}/{name}")
        assert (file.uid, file.mode) == (64000, mode)
    assert host.file(CONFIG).mode & 0o007 == 0
    assert (host.file(DATA).uid, host.file(DATA).mode) == (64000, 0o700)


def test_it_can_write_where_it_may_and_nowhere_else(host: Host) -> None:
    def write(path: str) -> int:
        return host.run(f"docker exec pdstack-molecule-web touch {path}").rc

    assert write("/tmp/x") == 0
    assert write(f"{DATA}/x") == 0
    assert write("/x") != 0
    assert write("/etc/pdstack/x") != 0


def test_what_the_dict_says_is_what_the_container_has(container: Callable[[str], dict[str, Any]]) -> None:
    found = container("web")
    assert {"GREETING=hello", "COUNT=3"} <= set(found["Config"]["Env"])
    assert found["Config"]["Labels"]["pdstack.test"] == "yes"
    assert found["Config"]["Labels"]["pdstack.deployment"] == "molecule"
    assert found["Config"]["StopTimeout"] == 5
    assert [(u["Name"], u["Soft"], u["Hard"]) for u in found["HostConfig"]["Ulimits"]] == [("nofile", 4096, 8192)]


def test_no_secret_is_in_the_container_s_description(host: Host) -> None:
    assert "not for all" not in host.check_output("docker container inspect pdstack-molecule-web")


def test_another_user_s_container_has_its_files_devices_and_entrypoint(
    host: Host, container: Callable[[str], dict[str, Any]]
) -> None:
    found = container("devices")
    assert (found["Config"]["User"], found["Config"]["Entrypoint"]) == ("1000:0", ["python3", "-S", "-E"])
    assert found["HostConfig"]["Runtime"] == "runc"
    assert [device["PathOnHost"] for device in found["HostConfig"]["Devices"]] == ["/dev/full"]
    file = host.file("/etc/pdstack/molecule/devices/page.txt")
    assert (file.uid, file.gid) == (1000, 0)
    assert host.check_output("docker exec pdstack-molecule-devices cat /etc/pdstack/page.txt") == "of 1000:0"


def test_gpus_are_asked_for_in_the_engine_s_own_words(host: Host) -> None:
    text = host.check_output("docker container inspect pdstack-molecule-gpus-cdi pdstack-molecule-gpus-runtime")
    cdi, runtime = json.loads(text)
    (request,) = cdi["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("cdi", ["nvidia.com/gpu=2", "nvidia.com/gpu=3"])
    assert {"CUDA_VISIBLE_DEVICES=0,1", "NVIDIA_VISIBLE_DEVICES=void"} <= set(cdi["Config"]["Env"])
    assert "NVIDIA_VISIBLE_DEVICES=0" in runtime["Config"]["Env"]
    assert [device["PathOnHost"] for device in runtime["HostConfig"]["Devices"]] == ["/dev/null"]
