"""Engine trtllm: prefill and decode were really separate, and KV took the path that the inventory asks for.

Everything is read from what runs: requests, counters, the processes' environments, their logs.
"""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from testinfra.host import Host

from pdstack.deploy import ask, trtllm_proof, ucx_log

pytestmark = pytest.mark.engine("trtllm")
# What a worker's log is looked through for; the rest stays on the host.
OF_INTEREST = r"\||UCX|kv-cache transceiver|Nixl|NIXL|CacheTransBufferManager"


@dataclass
class Asked:
    """The requests of this run, and the counters around them."""

    lengths: dict[str, int | None]
    answers: dict[str, list[ask.Answer]]
    counted: dict[str, int]
    requests: int


def metrics(topology: dict[str, Any]) -> dict[str, str]:
    return {worker["name"]: ask.get(f"{worker['status_url']}/metrics")[1] for worker in topology["workers"]}


def of(topology: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [worker for worker in topology["workers"] if worker["role"] == role]


@pytest.fixture(scope="session")
def config(deployment: dict[str, Any], topology: dict[str, Any], hosts: dict[str, Host]) -> dict[str, Any]:
    """The model's config.json on a worker's host."""
    host = hosts[topology["workers"][0]["host"]]
    return json.loads(host.file(f"{deployment['model']['path']}/config.json").content_string)


@pytest.fixture(scope="session")
def asked(deployment: dict[str, Any], topology: dict[str, Any], config: dict[str, Any], depth: str) -> Asked:
    """Short prompts, as many as make every worker take part, one near the buffer's limit, in `full` one beyond it."""
    wanted = deployment["workers"]
    context = min(
        [int(config["max_position_embeddings"])] + [w["max_seq_len"] for w in wanted.values() if w["max_seq_len"]]
    )
    buffer = min(w["transceiver"]["max_tokens_in_buffer"] for w in wanted.values())
    lengths = trtllm_proof.prompt_lengths(buffer, context)
    source = random.Random(3)
    times = {"short": 2 * len(topology["workers"]), "near the limit": 1, "beyond the buffer": int(depth == "full")}
    before = metrics(topology)
    answers: dict[str, list[ask.Answer]] = {}
    for kind, length in lengths.items():
        answers[kind] = []
        for at in range(times[kind] if length else 0):
            frontend = topology["frontends"][at % len(topology["frontends"])]["url"]
            prompt = [source.randrange(int(config["vocab_size"])) for _ in range(length or 0)]
            answer = ask.complete(frontend, deployment["model"]["name"], prompt, trtllm_proof.ANSWER_TOKENS)
            answers[kind].append(answer)
    requests = len(answers["short"]) + len(answers["near the limit"])
    return Asked(lengths, answers, trtllm_proof.counted(before, metrics(topology), topology["workers"]), requests)


@pytest.fixture(scope="session")
def logs(topology: dict[str, Any], hosts: dict[str, Host], asked: Asked) -> dict[str, str]:
    """What every worker has logged of its KV path, after the requests."""
    assert asked.requests
    found = {}
    for worker in topology["workers"]:
        command = f"docker logs {worker['container']} 2>&1 | grep -aE {shlex.quote(OF_INTEREST)} | tail -n 20000"
        found[worker["name"]] = hosts[worker["host"]].run(command).stdout
    return found


@pytest.mark.parametrize("kind", ["short", "near the limit"])
def test_a_prompt_is_answered(asked: Asked, kind: str) -> None:
    problems = [answer.problem() for answer in asked.answers[kind] if not answer.good]
    assert asked.answers[kind]
    assert not problems, f"prompt of {asked.lengths[kind]} tokens ({kind}):\n" + "\n".join(problems)


def test_prefill_and_decode_were_separate(asked: Asked, results: dict[str, Any]) -> None:
    results["separation"] = {
        "requests": asked.requests,
        "shortest": asked.lengths["short"],
        "longest": asked.lengths["near the limit"],
        **asked.counted,
    }
    for role, count in asked.counted.items():
        assert count >= asked.requests, (
            f"{asked.requests} requests were answered, and {role} workers counted {count} "
            f"({trtllm_proof.REQUESTS} of component {trtllm_proof.COMPONENTS[role]}); wanted all of them on both roles"
        )


def test_a_prompt_beyond_the_buffer_is_refused_or_answered(
    asked: Asked, deployment: dict[str, Any], topology: dict[str, Any], depth: str
) -> None:
    """UCX takes a buffer made for it; NIXL cannot, and must say so. Either way the next request is served."""
    if not asked.answers["beyond the buffer"]:
        assert depth != "full" or asked.lengths["beyond the buffer"] is None
        return
    answer = asked.answers["beyond the buffer"][0]
    if deployment["backend"] == "ucx":
        assert answer.good, answer.problem()
    else:
        assert answer.good or answer.error, "found neither an answer nor an error"
    after = ask.complete(topology["frontends"][0]["url"], deployment["model"]["name"], [1, 2, 3], 2)
    assert after.good, f"after a prompt beyond the buffer: {after.problem()}"


def test_every_worker_is_ready(topology: dict[str, Any]) -> None:
    assert {worker["role"] for worker in topology["workers"]} == {"prefill", "decode"}
    for worker in topology["workers"]:
        assert ask.get_json(f"{worker['status_url']}/health")["status"] == "ready", worker["name"]


def test_the_running_processes_have_the_environment_of_the_fabric(
    topology: dict[str, Any],
    hosts: dict[str, Host],
    inspected: dict[str, dict[str, Any]],
    deployment: dict[str, Any],
) -> None:
    """Not what the container was created with: what the engine's processes have now."""
    for worker in topology["workers"]:
        host, container = hosts[worker["host"]], worker["container"]
        root = int(inspected[worker["host"]][container]["State"]["Pid"])
        listed = host.run(f"docker top {container} -eo pid,ppid,args").stdout
        engines = [pid for pid, args in trtllm_proof.descendants(listed, root) if "python" in args]
        assert engines, f"{worker['name']}: found no python process in {container}:\n{listed}"
        for pid in engines:
            found = trtllm_proof.environment(host.run(f"tr '\\0' '\\n' < /proc/{pid}/environ").stdout)
            wanted = deployment["workers"][worker["name"]]["environment"]
            problems = trtllm_proof.environment_problems(wanted, found)
            assert not problems, f"{worker['name']}, process {pid}:\n" + "\n".join(problems)


def test_both_sides_name_the_same_backend_in_their_engine_s_file(
    topology: dict[str, Any], hosts: dict[str, Host], deployment: dict[str, Any]
) -> None:
    for worker in topology["workers"]:
        done = hosts[worker["host"]].run(f"docker exec {worker['container']} cat /etc/pdstack/engine.yaml")
        assert done.rc == 0, done.stderr
        found = yaml.safe_load(done.stdout).get("cache_transceiver_config")
        wanted = deployment["workers"][worker["name"]]["transceiver"]
        assert found == wanted, f"{worker['name']}: found {found}, wanted {wanted}"
        assert found["backend"] == deployment["backend"].upper()
    backends = {entry["transceiver"]["backend"] for entry in deployment["workers"].values()}
    assert len(backends) == 1, backends


def test_the_log_names_the_backend_and_a_transport_of_the_fabric(
    topology: dict[str, Any], logs: dict[str, str], deployment: dict[str, Any], results: dict[str, Any]
) -> None:
    """No silent fallback: what UCX itself says it took for KV is what the fabric promises."""
    taken = {name: ucx_log.kv_transports(log) for name, log in logs.items()}
    results["kv"] = {
        **results.get("kv", {}),
        "backend": deployment["backend"],
        "fabric": ", ".join(sorted({entry["fabric"] for entry in deployment["workers"].values()})),
        "transports": sorted({transport for found in taken.values() for transport in found}),
        "by_worker": {name: list(found) for name, found in taken.items()},
    }
    problems = [
        problem
        for worker in topology["workers"]
        for problem in trtllm_proof.log_problems(
            worker["name"], worker["role"], logs[worker["name"]], deployment["workers"][worker["name"]],
            deployment["backend"],
        )
    ]  # fmt: skip
    assert not problems, "\n".join(
        f"{p.what}.\n   found:  {p.found}\n   wanted: {p.wanted}\n   fix:    {p.fix}" for p in problems
    )
    assert any(taken.values()), (
        "KV path: no worker's log tells the transport that UCX chose.\n"
        "   found:  no table of protocols in `docker logs` of any worker\n"
        "   wanted: UCX's own tables (UCX_PROTO_INFO=y), printed when workers connect\n"
        "   fix:    logs are bounded, and an old one has lost them: restart a decode worker and verify again"
    )
