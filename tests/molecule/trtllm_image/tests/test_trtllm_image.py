from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
import yaml
from testinfra.host import Host

VERSIONS = "inventories/common/group_vars/all/versions.yml"
PORTS = {"etcd": 23901, "peer": 23902, "nats": 23903, "frontend": 23905, "prefill": 23906, "decode": 23907}
ENGINE = """\
cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 4096, kv_transfer_timeout_ms: 60000}
kv_cache_config: {free_gpu_memory_fraction: 0.5}
"""
ASK = '{"model": "tiny", "prompt": "The quick brown fox jumps over the lazy dog", "max_tokens": 8, "temperature": 0}'


@pytest.fixture(scope="module")
def image(host: Host) -> str:
    listed = host.check_output("docker images --format '{{.Repository}}:{{.Tag}}'").split()
    (found,) = [name for name in listed if name.startswith("pdstack/trtllm-runtime:1.2.0rc3-")]
    assert not [name for name in listed if "trtllm-candidate" in name or name.startswith("dynamo:latest")]
    return found


def test_the_tag_says_the_version_and_the_content(image: str) -> None:
    version, _, content = image.rpartition(":")[2].rpartition("-")
    assert version == "1.2.0rc3"
    assert len(content) == 12


def test_the_image_has_the_pair_that_was_asked_for(host: Host, image: str, pytestconfig: pytest.Config) -> None:
    versions = yaml.safe_load((pytestconfig.rootpath / VERSIONS).read_text())["versions"]
    script = "import importlib.metadata as m, tensorrt_llm as t; print(t.__version__, m.version('ai-dynamo'))"
    printed = host.check_output(f'docker run --rm --network none --entrypoint python3 {image} -c "{script}"')
    assert printed.splitlines()[-1].split() == [versions["tensorrt_llm"], versions["dynamo"]]


def test_it_starts_as_upstreams_does(host: Host, image: str) -> None:
    config = json.loads(host.check_output(f"docker image inspect {image}"))[0]["Config"]
    assert config["User"] == "dynamo"
    assert config["Entrypoint"] == ["/opt/nvidia/nvidia_entrypoint.sh"]
    assert "TRTLLM_USE_UCX_KVCACHE=1" in config["Env"]


def test_the_log_of_the_build_is_kept_with_both_of_its_steps(host: Host, image: str) -> None:
    log = host.file(f"/var/cache/pdstack/trtllm_image/logs/{image.rpartition(':')[2]}.log").content_string
    assert log.startswith(
        "$ bash ./container/build.sh --framework trtllm --tensorrtllm-pip-wheel tensorrt-llm==1.2.0rc3 "
    )
    assert "dynamo-base:v0.7.0.post1-trtllm" in log
    logs = "/var/cache/pdstack/trtllm_image/source/build-logs"
    assert set(host.file(logs).listdir()) == {"base-image-build.log", "framework-trtllm-build.log"}


@pytest.fixture(scope="module")
def start(host: Host, image: str) -> Iterator[Callable[..., str]]:
    """Run containers of the image on the host's network; all of them go in the end."""
    names: list[str] = []
    host.run("rm -rf /var/lib/pdstack-test/served; install -d -m 0777 /var/lib/pdstack-test/served")
    volume = "-v /var/lib/pdstack-test/served:/served"
    run = f"docker run {volume} --env ETCD_ENDPOINTS=http://127.0.0.1:{PORTS['etcd']}"
    run += f" --env NATS_SERVER=nats://127.0.0.1:{PORTS['nats']} --env DYN_NAMESPACE=byhand --network host"

    def begin(name: str, options: str, command: str, *, stays: bool = True) -> str:
        if not stays:
            return host.check_output(f"{run} --rm {options} {image} {command}")
        names.append(f"byhand-{name}")
        host.run(f"docker rm --force byhand-{name}")
        return host.check_output(
            f"{run} --detach --name byhand-{name} --hostname byhand-{name} {options} {image} {command}"
        )

    yield begin
    for name in names:
        host.run(f"docker rm --force --volumes {name}")


def test_prefill_and_decode_of_the_image_answer_together(host: Host, start: Callable[..., str]) -> None:
    client, peer = (f"http://127.0.0.1:{PORTS[name]}" for name in ("etcd", "peer"))
    start("model", "", "python3 -m pdstack.models.tiny --out /served/model", stays=False)
    start("yaml", "", f"python3 -c \"open('/served/engine.yml', 'w').write('''{ENGINE}''')\"", stays=False)
    start(
        "etcd", "", f"etcd --data-dir /tmp/etcd --listen-client-urls {client} --advertise-client-urls {client} "
        f"--listen-peer-urls {peer} --initial-advertise-peer-urls {peer} --initial-cluster default={peer}",
    )  # fmt: skip
    start("nats", "", f"nats-server -js -a 127.0.0.1 -p {PORTS['nats']} -sd /tmp/nats")
    start("frontend", "", f"python3 -m dynamo.frontend --http-port {PORTS['frontend']} --enforce-disagg")
    for role in ("prefill", "decode"):
        start(
            role, f"--pid host --ipc host --cap-add SYS_PTRACE --env UCX_TLS=cma,tcp,self --env UCX_NET_DEVICES=lo "
            f"--env UCX_PROTO_INFO=y --env NVIDIA_VISIBLE_DEVICES=0 --env DYN_SYSTEM_PORT={PORTS[role]}",
            "python3 -m dynamo.trtllm --model-path /served/model --served-model-name tiny "
            f"--disaggregation-mode {role} --extra-engine-args /served/engine.yml",
        )  # fmt: skip
    asking = (
        'python3 -c "import sys, urllib.request as u; r = u.Request(sys.argv[1], sys.argv[2].encode(), '
        "{'Content-Type': 'application/json'}); print(u.urlopen(r, timeout=30).read().decode())\" "
        f"http://127.0.0.1:{PORTS['frontend']}/v1/completions '{ASK}'"
    )
    deadline = time.monotonic() + 120
    while (answered := host.run(asking)).rc != 0:
        logs = host.run("docker logs --tail 30 byhand-prefill; docker logs --tail 30 byhand-decode")
        assert time.monotonic() < deadline, answered.stderr[-500:] + logs.stdout + logs.stderr
        time.sleep(1)
    answer = json.loads(answered.stdout)
    assert answer["usage"]["completion_tokens"] == 8
    for role, component in {"prefill": "prefill", "decode": "tensorrt_llm"}.items():
        fetch = (
            f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{PORTS[role]}/metrics').read().decode())"
        )
        metrics = host.check_output(f'python3 -c "{fetch}"').splitlines()
        (counted,) = [line for line in metrics if line.startswith("dynamo_component_requests_total{")]
        assert f'dynamo_component="{component}"' in counted
        assert float(counted.rpartition(" ")[2]) >= 1
    log = host.run("docker logs byhand-decode")
    assert "Using UCX kv-cache transceiver" in log.stdout
    assert "cma/memory" in log.stdout
