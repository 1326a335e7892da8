"""The step kv_path: an end at each worker's place measures how KV gets from prefill to decode, before workers start.

An end's container is its worker's own but for the program, so what is measured is what the worker will have. The
results are plain JSON; pdstack.transfer.qualify says what is in them, and is not imported here: the controller has no
numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pdstack.deploy import fabrics, services
from pdstack.deploy.services import KEY_FILE, Spec
from pdstack.deploy.topology import CONFIG_MOUNT, Topology, Worker, bracketed, container_name

AGENTS_FILE = "agents.json"
# What a kept measurement must be to be compared with (pdstack.transfer.qualify.result.FORMAT).
FORMAT = "pdstack kv path/1"
# In the end's container: a memory mount of its own.
JSON_FILE, HTML_FILE = f"{services.SCRATCH}/kv_path.json", f"{services.SCRATCH}/kv_path.html"


def end_name(worker: Worker) -> str:
    """Return the service that stands in for a worker: short, as a container's name is a hostname."""
    return f"kv-path-{worker['role'][0]}{worker['index']}"


def end(
    entry: Worker,
    topology: Topology,
    *,
    image: str,
    version: str,
    model_dir: str,
    engine: Mapping[str, Any],
    fabric: Mapping[str, Any],
    cluster_key: str,
    asks: bool = False,
) -> Spec:
    """Return the end of a worker; the arguments are those of its `services.worker`.

    The one that `asks` also has the list of all ends.
    """
    config = services.worker_config(
        entry, topology, namespace="", model_name="", model_dir=model_dir, engine=engine, transfer={},
        drain_timeout_s=0, migration_limit=0, data_dir="",
    )  # fmt: skip
    spec = services.worker(entry, config, image=image, version=version, fabric=fabric, cluster_key=cluster_key)
    for key in ("healthcheck", "data_dirs"):
        del spec[key]
    files = [file for file in spec["files"] if file["path"] == KEY_FILE]
    if asks:
        files.append({"path": AGENTS_FILE, "content": json.dumps(agents(topology), indent=1) + "\n"})
    listen = f"{bracketed(entry['address'])}:{entry['kv_path_ports'][0]}"
    return {
        **spec,
        "name": end_name(entry),
        "command": [
            "pdstack.transfer.qualify.end", "--listen", listen, "--name", entry["name"],
            "--key-file", f"{CONFIG_MOUNT}/{KEY_FILE}",
        ],
        "files": files,
        "stop_timeout": 5,
    }  # fmt: skip


def agents(topology: Topology) -> dict[str, list[dict[str, Any]]]:
    """Return where all ends are, as `pdstack kv-path --agents` reads it; those of one host share it."""
    found: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
    for worker in topology["workers"]:
        place = {"name": worker["name"], "host": worker["address"], "shares": worker["host"]}
        found[worker["role"]].append({**place, "ports": list(worker["kv_path_ports"])})
    return found


def asker(topology: Topology) -> dict[str, str]:
    """Return the worker at whose place the measurement is asked for: `name`, `host`, `container` of its end."""
    worker = next(worker for worker in topology["workers"] if worker["role"] == "decode")
    return {
        "name": worker["name"], "host": worker["host"],
        "container": container_name(topology["name"], end_name(worker)),
    }  # fmt: skip


def command(
    topology: Topology,
    *,
    path: str,
    backend: str,
    fabric: Mapping[str, Any],
    floor: float,
    model_dir: str,
    engine: Mapping[str, Any],
    nbytes: int,
    rounds: int,
) -> list[str]:
    """Return the program and arguments that measure, in the end that asks. `floor` 0: the profile's."""
    tokens = sorted({int({**engine, **worker["engine"]}["block_size"]) for worker in topology["workers"]})
    words = ["python3", "-m", "pdstack", "kv-path", "--agents", f"{CONFIG_MOUNT}/{AGENTS_FILE}"]
    words += ["--key-file", f"{CONFIG_MOUNT}/{KEY_FILE}", "--json", JSON_FILE, "--html", HTML_FILE]
    words += ["--model", model_dir, "--block-tokens", *map(str, tokens)]
    words += ["--path", backend if path == "backend" else path, "--backend", backend]
    words += ["--bytes", str(nbytes), "--rounds", str(rounds)]
    words += ["--floor", f"{float(floor) or float(fabric.get('floor', 0)):g}"]
    return [*words, "--want", *fabrics.wanted(fabric, path)]


def compared(words: Sequence[str], earlier: str) -> list[str]:
    """Return the command with a comparison to the JSON of an earlier measurement, which it gets on standard input."""
    return [*words, *(["--compare", "-"] if comparable(earlier) else [])]


def comparable(earlier: str) -> bool:
    """Return whether a kept measurement can be compared with: another version's must not stop a deployment."""
    return bool(earlier) and json.loads(earlier).get("format") == FORMAT


def fingerprint(parts: Sequence[Any]) -> str:
    """Return a SHA-256 (hex) over all that a measurement depends on; `parts` is anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def orders(result: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return for each decode worker the order of the paths to each prefill worker, where it is not the usual one."""
    found: dict[str, dict[str, list[str]]] = {}
    for pair in result.get("pairs", ()):
        if pair.get("order"):
            found.setdefault(pair["decode"], {})[pair["prefill"]] = list(pair["order"])
    return found
