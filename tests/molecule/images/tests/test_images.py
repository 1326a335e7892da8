from __future__ import annotations

import json
import re

import pytest
import yaml
from testinfra.host import Host

VERSIONS = "inventories/common/group_vars/all/versions.yml"


@pytest.fixture(scope="module")
def images(host: Host) -> dict[str, str]:
    listed = host.check_output("docker images --format '{{.Repository}}:{{.Tag}}'").split()
    return {name.split(":")[0].removeprefix("pdstack/"): name for name in listed if name.startswith("pdstack/")}


@pytest.fixture(scope="module")
def versions(pytestconfig: pytest.Config) -> dict[str, str]:
    return yaml.safe_load((pytestconfig.rootpath / VERSIONS).read_text())["versions"]


def run(host: Host, image: str, *command: str, entrypoint: str = "") -> str:
    chosen = f"--entrypoint {entrypoint}" if entrypoint else ""
    return host.check_output(f"docker run --rm --network none {chosen} {image} {' '.join(command)}")


def test_each_image_is_tagged_by_its_content(images: dict[str, str]) -> None:
    assert set(images) == {"base", "etcd", "nats", "worker"}
    assert all(re.fullmatch(r"pdstack/\w+:[0-9a-f]{12}", name) for name in images.values()), images


@pytest.mark.parametrize("name", ["etcd", "nats", "worker"])
def test_no_image_runs_as_root(host: Host, images: dict[str, str], name: str) -> None:
    config = json.loads(host.check_output(f"docker image inspect {images[name]}"))[0]["Config"]
    assert config["User"] == "64000:64000"


def test_etcd_is_of_the_pinned_version(host: Host, images: dict[str, str], versions: dict[str, str]) -> None:
    assert f"etcd Version: {versions['etcd']}" in run(host, images["etcd"], "--version")


def test_nats_is_of_the_pinned_version(host: Host, images: dict[str, str], versions: dict[str, str]) -> None:
    assert f"v{versions['nats']}" in run(host, images["nats"], "--version")


def test_the_worker_has_what_it_imports_and_nothing_to_install_with(
    host: Host, images: dict[str, str], versions: dict[str, str]
) -> None:
    script = "import pdstack.worker,dynamo.llm,importlib.metadata as m;print(m.version('ai-dynamo'))"
    assert run(host, images["worker"], "-c", f'"{script}"', entrypoint="python3").strip() == versions["dynamo"]
    for tool in ("pip", "apt-get", "dpkg"):
        assert host.run(f"docker run --rm --entrypoint {tool} {images['worker']} --version").rc != 0


def test_no_build_leaves_a_container(host: Host) -> None:
    assert host.check_output("docker ps --all --quiet --filter name=pdstack-images") == ""
