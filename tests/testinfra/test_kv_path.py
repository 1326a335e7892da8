"""Disaggregated answers are the aggregated ones token for token, and the KV cache took the path that was asked for.

One measurement (`measured`) feeds all tests: counters before, prompts served, counters after, the same prompts in one
aggregated engine of the same image.
"""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from pdstack.deploy import ask, fabrics, proof

# With engine trtllm: test_trtllm.py.
pytestmark = pytest.mark.engine("reference")
CONCURRENT = 4
# Of so many transfers one may be a trial of another path (pdstack.transfer.choice.EARLY_EVERY is twice that).
TRIES = 5
# Prompts that no worker has seen, so that KV moves even where decode's prefix cache has all the others.
FRESH = {"quick": 3, "full": 6}
RECORD_TIMEOUT_S = 5.0


@dataclass
class Measured:
    """The first `compared` requests are those of the aggregated run; the others are fresh ones."""

    compared: int
    lengths: list[int]
    answers: list[ask.Answer]
    records: list[dict[str, Any]]
    before: dict[str, str]
    after: dict[str, str]
    block_bytes: int


def workers(topology: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [worker for worker in topology["workers"] if worker["role"] == role]


def scrape(topology: dict[str, Any]) -> dict[str, str]:
    found = {}
    for worker in topology["workers"]:
        status, text = ask.get(f"{worker['status_url']}/metrics")
        assert status == 200
        found[worker["name"]] = text
    return found


def record_of(request_id: str, topology: dict[str, Any]) -> dict[str, Any]:
    """What the decode worker that served a request remembers of it; it notes that just after the last token."""
    deadline = time.monotonic() + RECORD_TIMEOUT_S
    while time.monotonic() < deadline:
        for worker in workers(topology, "decode"):
            status, body = ask.get(f"{worker['status_url']}/requests/{request_id}")
            if status == 200 and (record := json.loads(body)).get("finish_reason"):
                return {"worker": worker["name"], **record}
        time.sleep(0.05)
    raise AssertionError(f"no decode worker knows request {request_id} after {RECORD_TIMEOUT_S} s")


@pytest.fixture(scope="session")
def decode_host(topology: dict[str, Any], hosts: dict[str, Host]) -> Host:
    return hosts[workers(topology, "decode")[0]["host"]]


@pytest.fixture(scope="session")
def block_size(deployment: dict[str, Any]) -> int:
    return int(deployment["engine_settings"]["block_size"])


@pytest.fixture(scope="session")
def shape(deployment: dict[str, Any], decode_host: Host) -> proof.ModelShape:
    config = json.loads(decode_host.file(f"{deployment['model']['path']}/config.json").content_string)
    return proof.ModelShape.from_config(config)


@pytest.fixture(scope="session")
def requests(deployment: dict[str, Any], depth: str, shape: proof.ModelShape, block_size: int) -> list[dict[str, Any]]:
    context = int(deployment["engine_settings"]["max_context"])
    lengths = proof.prompt_lengths(context, block_size, depth)
    return [
        {"token_ids": prompt, "max_tokens": proof.MAX_TOKENS, "ignore_eos": True}
        for prompt in proof.prompts(lengths, shape.vocabulary)
    ]


@pytest.fixture(scope="session")
def fresh(depth: str, requests: list[dict[str, Any]], shape: proof.ModelShape) -> list[dict[str, Any]]:
    longest = max(len(request["token_ids"]) for request in requests)
    prompts = proof.prompts([longest] * FRESH[depth], shape.vocabulary, seed=secrets.randbits(32))
    return [{"token_ids": prompt, "max_tokens": proof.MAX_TOKENS, "ignore_eos": True} for prompt in prompts]


@pytest.fixture(scope="session")
def measured(
    deployment: dict[str, Any],
    topology: dict[str, Any],
    requests: list[dict[str, Any]],
    fresh: list[dict[str, Any]],
    shape: proof.ModelShape,
    block_size: int,
) -> Measured:
    frontend, model = topology["frontends"][0]["url"], deployment["model"]["name"]

    def serve(request: dict[str, Any]) -> ask.Answer:
        # The prompts are the same at every verification: out of a prefix cache they would prove nothing.
        return ask.complete(frontend, model, request["token_ids"], request["max_tokens"], prefix_cache=False)

    compared, requests = len(requests), [*requests, *fresh]
    before = scrape(topology)
    # Every third one alone, the others side by side.
    alone = {at: serve(request) for at, request in enumerate(requests) if at % 3 == 0}
    with ThreadPoolExecutor(CONCURRENT) as pool:
        others = [at for at in range(len(requests)) if at not in alone]
        together = dict(zip(others, pool.map(serve, [requests[at] for at in others]), strict=True))
    answers = [(alone | together)[at] for at in range(len(requests))]
    problems = [answer.problem() for answer in answers if not answer.good]
    assert not problems, "\n".join(problems)
    records = [record_of(answer.request_id, topology) for answer in answers]
    return Measured(
        compared=compared,
        lengths=[len(request["token_ids"]) for request in requests],
        answers=answers,
        records=records,
        before=before,
        after=scrape(topology),
        block_bytes=shape.block_bytes(block_size),
    )


@pytest.fixture(scope="session")
def reference(
    deployment: dict[str, Any], requests: list[dict[str, Any]], decode_host: Host, state_dir: Path
) -> tuple[list[dict[str, Any]], bool]:
    """The aggregated run of the same requests, and whether an earlier run with the same content was taken."""
    cache = state_dir / "reference" / f"{proof.reference_key(deployment, requests)}.json"
    if cache.is_file():
        return json.loads(cache.read_text()), True
    path, settings = deployment["model"]["path"], dict(deployment["engine_settings"])
    settings.pop("default_max_tokens", None)  # the worker's, not the engine's: every request here says its own
    payload = base64.b64encode(gzip.compress(json.dumps({"requests": requests}).encode())).decode()
    command = [
        "docker", "run", "--rm", "--interactive", "--network", "none",
        # Named and labelled, so that a run that was interrupted leaves nothing that destroy does not find.
        "--name", f"pdstack-{deployment['name']}-reference-{secrets.token_hex(3)}",
        "--label", f"pdstack.deployment={deployment['name']}",
        "--read-only", "--tmpfs", "/tmp",
        "--user", f"{deployment['uid']}:{deployment['uid']}", "--cap-drop", "ALL",
        "--env", f"OPENBLAS_NUM_THREADS={settings['threads']}",
        "--volume", f"{path}:{path}:ro",
        deployment["images"]["worker"],
        "pdstack.engine.aggregate", "--model", path, "--settings", json.dumps(settings),
    ]  # fmt: skip
    done = decode_host.run(f"echo {payload} | base64 -d | gunzip | {shlex.join(command)}")
    assert done.rc == 0, f"the aggregated run failed: {done.stdout[-1000:]} {done.stderr[-3000:]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    assert len(found) == len(requests)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps(found))
    return found, False


def test_disaggregated_answers_are_the_aggregated_ones(
    measured: Measured, reference: tuple[list[dict[str, Any]], bool], depth: str, results: dict[str, Any]
) -> None:
    wanted, cached = reference
    if depth == "full":
        assert len(wanted) >= 20
    served = [record["token_ids"] for record in measured.records[: measured.compared]]
    assert all(len(tokens) == proof.MAX_TOKENS for tokens in served)
    lengths = measured.lengths[: measured.compared]
    labels = [f"prompt of {length} tokens" for length in lengths]
    problems = proof.differences([entry["token_ids"] for entry in wanted], served, labels)
    assert not problems, "\n".join(problems)
    results["equality"] = {
        "prompts": len(served),
        "shortest": min(lengths),
        "longest": max(lengths),
        "tokens": sum(len(tokens) for tokens in served),
        "reference_cached": cached,
    }


def test_each_prompt_moved_its_kv_cache(measured: Measured, block_size: int) -> None:
    for length, record in zip(measured.lengths, measured.records, strict=True):
        # What decode's prefix cache holds is compared by its hashes, and not moved.
        blocks = proof.blocks(length, block_size) - record["transfer"]["held_blocks"]
        wanted = blocks * measured.block_bytes
        assert record["transfer"]["bytes"] == wanted, f"prompt of {length} tokens: {record['transfer']}"
    for record in measured.records[measured.compared :]:
        assert record["transfer"]["held_blocks"] == 0, "a prompt that nobody has seen was in decode's cache"


def test_the_counters_show_the_bytes(measured: Measured, topology: dict[str, Any], block_size: int) -> None:
    needed = proof.expected_bytes(measured.lengths, block_size, measured.block_bytes)
    wanted = sum(record["transfer"]["bytes"] for record in measured.records)

    def moved(role: str, name: str, **labels: str) -> float:
        return sum(
            proof.metric(measured.after[w["name"]], name, **labels)
            - proof.metric(measured.before[w["name"]], name, **labels)
            for w in workers(topology, role)
        )

    # Clients of a deployment in service may move more in the meantime, never less.
    read = moved("decode", "pdstack_kv_bytes_total")
    assert read >= wanted, f"decode workers read {read:.0f} bytes, wanted {wanted}"
    held = moved("decode", "pdstack_kv_held_bytes_total")
    assert read + held >= needed, f"decode workers read {read:.0f} bytes and held {held:.0f}, wanted {needed}"
    acknowledged = moved("prefill", "pdstack_kv_exported_bytes_total")
    assert acknowledged >= wanted, f"prefill workers handed over {acknowledged:.0f} bytes, wanted {wanted}"
    assert moved("decode", "pdstack_kv_transfers_total") >= len(measured.lengths)


def test_the_transport_is_the_one_of_the_fabric(
    measured: Measured, deployment: dict[str, Any], results: dict[str, Any]
) -> None:
    wanted = fabrics.wanted(deployment["fabric"], deployment["path"])
    transfers = [record["transfer"] for record in measured.records if record["transfer"]["bytes"]]
    found = Counter(transfer["transport"] for transfer in transfers)
    results["kv"] = {
        **results.get("kv", {}),
        "backend": deployment["backend"],
        "path": deployment["path"],
        "fabric": deployment["fabric"]["name"],
        "transports": sorted(set(found) & set(wanted)),
        "tried": sorted(set(found) - set(wanted)),
        "bytes": sum(transfer["bytes"] for transfer in transfers),
    }
    assert found, "nothing was transferred"
    # With auto one transfer of some goes over another path, to see how fast that one is; no other may.
    others = sum(count for transport, count in found.items() if transport not in wanted)
    most = -(-len(transfers) // TRIES) if deployment["path"] == "auto" else 0
    assert others <= most, f"KV went over {dict(found)}, fabric {deployment['fabric']['name']} names {wanted}"


def test_the_speed_is_measured_beside_a_memcpy(
    measured: Measured, topology: dict[str, Any], decode_host: Host, results: dict[str, Any]
) -> None:
    transfers = [record["transfer"] for record in measured.records if record["transfer"]["bytes"]]
    speed = proof.transfer_speed(
        {"bytes": t["bytes"], "seconds": t.get("read_seconds") or t["seconds"]} for t in transfers
    )
    assert speed is not None
    largest = max(transfer["bytes"] for transfer in transfers)
    container = workers(topology, "decode")[0]["container"]
    done = decode_host.run(f"docker exec {container} python3 -m pdstack.transfer.limit --bytes {largest}")
    assert done.rc == 0, done.stderr
    limit = json.loads(done.stdout)["memcpy_gbps"]
    results["kv"] = {**results.get("kv", {}), "gb_per_s": round(speed, 3), "memcpy_gb_per_s": limit}
    assert speed > 0
    assert limit > 0


def test_nothing_failed_and_nothing_is_held(measured: Measured, topology: dict[str, Any]) -> None:
    for worker in topology["workers"]:
        before, after = measured.before[worker["name"]], measured.after[worker["name"]]
        failed = proof.metric(after, "pdstack_kv_failures_total") - proof.metric(before, "pdstack_kv_failures_total")
        assert failed == 0, f"{worker['name']}: {failed:.0f} transfers failed"
        assert proof.metric(after, "pdstack_kv_quarantined_blocks") == 0
