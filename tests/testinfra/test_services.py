"""Each container runs, is healthy, is of the pinned image and version, and is no more privileged than it must be."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from pdstack.deploy import ask

Inspected = dict[str, dict[str, Any]]

VERSION_SCRIPT = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({n: m.version(n) for n in ('ai-dynamo', 'ai-dynamo-runtime', 'nixl-cu12', 'libucx-cu12')}))"
)


@pytest.fixture
def container(service: dict[str, Any], inspected: Inspected) -> dict[str, Any]:
    found = inspected[service["host"]].get(service["container"])
    assert found, f"{service['host']}: found no container {service['container']}; run the deploy again"
    return found


# Asks a running container of the runtime image, by reading and without importing its engine.
RUNTIME_PROBE = Path(__file__).resolve().parents[2] / "src/pdstack/deploy/runtime_probe.py"
RUNTIME_USER = "1000:0"


def runtime_versions(service: dict[str, Any], host: Host) -> dict[str, str]:
    """What the runtime image of engine trtllm holds, by the names of the versions file."""
    script = shlex.quote(RUNTIME_PROBE.read_text())
    done = host.run(f"docker exec {service['container']} python3 -c {script}")
    assert done.rc == 0, done.stderr
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    found = {"dynamo": facts["dynamo"], "tensorrt_llm": facts["tensorrt_llm"]["module"], "ucx": facts["ucx"]}
    return found | {name.replace("-", "_"): version for name, version in facts["nixl"].items()}


def wanted_version(service: dict[str, Any], name: str, deployment: dict[str, Any]) -> str:
    """The version of the file for what a service runs from; of NIXL's packages all must be the same."""
    if service["image"] != "runtime":
        return str(deployment["versions"][name])
    return str(deployment["runtime"]["nixl" if name.startswith("nixl") else name])


def measured_versions(service: dict[str, Any], host: Host) -> dict[str, str]:
    """Ask the running service, not its label."""
    if service["kind"] == "etcd":
        return {"etcd": ask.get_json(f"{service['client_url']}/version")["etcdserver"]}
    if service["kind"] == "nats":
        return {"nats": ask.get_json(f"{service['monitor_url']}/varz")["version"]}
    if service["image"] == "runtime":
        return runtime_versions(service, host)
    found = host.run(f"docker exec {service['container']} python3 -c {shlex.quote(VERSION_SCRIPT)}")
    assert found.rc == 0, found.stderr
    versions = json.loads(found.stdout)
    assert versions["ai-dynamo"] == versions["ai-dynamo-runtime"]
    return {"dynamo": versions["ai-dynamo"], "nixl": versions["nixl-cu12"], "ucx": versions["libucx-cu12"]}


def test_running_and_healthy(
    service: dict[str, Any],
    container: dict[str, Any],
    hosts: dict[str, Host],
    deployment: dict[str, Any],
    results: dict[str, Any],
) -> None:
    state, host = container["State"], hosts[service["host"]]
    assert state["Running"], f"{service['container']}: {state['Status']}, exit code {state['ExitCode']}"
    assert "Health" in state, f"{service['container']} has no health check"
    health = state["Health"]["Status"]
    if health != "healthy":
        # The engine asks once an interval, so what it says may be of before the deployment: ask the same question now.
        test = container["Config"]["Healthcheck"]["Test"]
        assert test[0] == "CMD"
        asked = host.run(f"docker exec {service['container']} {shlex.join(test[1:])}")
        health = "healthy" if asked.rc == 0 else f"unhealthy: {asked.stdout} {asked.stderr}"
    last = (state["Health"]["Log"] or [{"Output": ""}])[-1]["Output"]
    versions = measured_versions(service, host)
    if service["kind"] == "workers" and service["image"] == "runtime":
        results["runtime"] = versions
    results["services"].append(
        {
            "service": service["service"],
            "host": service["host"],
            "version": next(iter(versions.values())),
            "health": health,
            "endpoint": service["endpoint"],
            "container": service["container"],
        }
    )
    assert health == "healthy", f"{service['container']}: {health} {last}"
    for name, version in versions.items():
        wanted = wanted_version(service, name, deployment)
        assert version == wanted, f"{service['container']}: found {name} {version}, wanted {wanted}"


def test_pinned_image(
    service: dict[str, Any], container: dict[str, Any], hosts: dict[str, Host], deployment: dict[str, Any]
) -> None:
    wanted = deployment["images"][service["image"]]
    assert container["Config"]["Image"] == wanted
    assert not wanted.endswith(":latest")
    image = hosts[service["host"]].run(f"docker image inspect --format '{{{{.Id}}}}' {shlex.quote(wanted)}").stdout
    assert container["Image"] == image.strip(), f"{wanted} was rebuilt after {service['container']} was created"


def test_confined(service: dict[str, Any], container: dict[str, Any], deployment: dict[str, Any]) -> None:
    config, limits = container["Config"], container["HostConfig"]
    # The image's own user, whose group is 0; the engine compiles kernels into its home.
    engine = service["image"] == "runtime" and service["kind"] in ("workers", "frontends")
    if engine:
        assert config["User"] == RUNTIME_USER
    else:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"]), (
            f"user {config['User']!r}, wanted a numeric one, not root"
        )
        assert config["User"].split(":")[0] == str(deployment["uid"])
    assert limits["ReadonlyRootfs"] or (engine and service["kind"] == "workers")
    assert limits["CapDrop"] == ["ALL"]
    assert any(option.startswith("no-new-privileges") for option in limits["SecurityOpt"])
    assert not limits["Privileged"]
    assert limits["RestartPolicy"]["Name"] == "always"
    assert limits["LogConfig"]["Config"].keys() >= {"max-size", "max-file"}
    assert config["Hostname"] == service["container"]
    assert "RUST_BACKTRACE=0" in config["Env"]


# Agents find each other under their hostnames; etcd members and the like have one on each host.
def test_workers_hostnames_are_unique(inspected: Inspected, topology: dict[str, Any]) -> None:
    workers = [inspected[worker["host"]][worker["container"]] for worker in topology["workers"]]
    names = [entry["Config"]["Hostname"] for entry in workers]
    assert len(names) == len(set(names)) > 0
