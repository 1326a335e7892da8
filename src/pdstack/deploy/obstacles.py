"""What on a host is in the way of a deployment: ports in use by others, too little memory, too little disk.

Works on what `survey` read on the host; nothing is changed before all hosts have passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdstack.deploy import topology
from pdstack.deploy.services import names
from pdstack.deploy.topology import Topology
from pdstack.deploy.validate import Problem

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # compared with, never bound to
MIB = 1024 * 1024
# Resident memory beside weights and KV pool, measured on idle services: worker 170 MiB, the others 130 MiB together.
WORKER_MIB = 250
OTHERS_MIB = 300


def find(
    survey: Mapping[str, Any],
    deployment: Topology,
    host: str,
    *,
    engine: Mapping[str, Any],
    model: Mapping[str, Any],
    model_dir: str,
) -> list[Problem]:
    """Return what is in the way on `host`.

    `engine` are the engine's settings there, `model` what is known of the model's size (`weights_mib`,
    `kv_bytes_per_token`; may be empty), `model_dir` its directory, which `survey` must have looked at.
    """
    return [
        *_ports(survey, deployment, host),
        *_memory(survey, deployment, host, engine, model),
        *_disk(survey, host, model, model_dir),
    ]


def render(found: Sequence[Problem], host: str) -> str:
    """Return the obstacles as the text an operator reads; empty when there are none."""
    if not found:
        return ""
    lines = [f"{host} is not ready for the deployment. Nothing was changed."]
    for problem in found:
        lines += [
            f"- {problem.what}",
            f"     found:  {problem.found}",
            f"     wanted: {problem.wanted}",
            f"     fix:    {problem.fix}",
        ]
    return "\n".join(lines)


def _holder(listener: Mapping[str, Any]) -> str:
    process = f"process {listener['process'] or '?'} (pid {listener['pid']})"
    if listener["container"]:
        return f"container {listener['container']}, {process}"
    return process if listener["pid"] else "a process that this user may not look into"


def _ports(survey: Mapping[str, Any], deployment: Topology, host: str) -> Iterator[Problem]:
    for use in topology.port_uses(deployment):
        if use["host"] != host:
            continue
        for listener in survey["listeners"]:
            same_address = listener["address"] in (*EVERYWHERE, use["address"]) or not use["address"][:1].isdigit()
            # A container of this deployment is not in the way: a port that moves to another service is given up by the
            # first, and a worker that is no longer wanted is removed before the others start.
            stranger = listener["deployment"] != deployment["name"]
            if listener["port"] == use["port"] and same_address and stranger:
                yield Problem(
                    f"port {use['port']} for {use['service']}", f"taken by {_holder(listener)}", "a free port",
                    f"stop it, set another pdstack_port_offset, or change pdstack_ports ({use['service']})",
                )  # fmt: skip
                break


def _memory(
    survey: Mapping[str, Any], deployment: Topology, host: str, engine: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[Problem]:
    workers = [worker for worker in deployment["workers"] if worker["host"] == host]
    # What runs already has its memory, which is then not free.
    if not workers or "weights_mib" not in model or set(names(deployment, host)) & set(survey["containers"]):
        return
    tokens = sum({**engine, **worker["engine"]}["kv_blocks"] * engine["block_size"] for worker in workers)
    pools = tokens * int(model["kv_bytes_per_token"]) // MIB
    # The workers of a host map the same weights.
    wanted = OTHERS_MIB + len(workers) * WORKER_MIB + int(model["weights_mib"]) + pools
    found = survey["memory"]["available_mib"]
    if found < wanted:
        yield Problem(
            f"memory for {len(workers)} worker{'s' if len(workers) != 1 else ''}",
            f"{found} MiB available of {survey['memory']['total_mib']} MiB",
            f"{wanted} MiB ({pools} MiB of it for KV pools)",
            "lower engine_settings.kv_blocks, run fewer workers on this host, or give it more memory",
        )


def _disk(survey: Mapping[str, Any], host: str, model: Mapping[str, Any], model_dir: str) -> Iterator[Problem]:
    if survey["present"].get(model_dir) or "disk_mib" not in model:
        return
    found, wanted = survey["disk_mib"][model_dir], int(model["disk_mib"])
    if found < wanted:
        yield Problem(
            f"disk for the model on {host}", f"{found} MiB free at {model_dir}", f"{wanted} MiB",
            "free some space, or mount a larger file system below pdstack_data_root",
        )  # fmt: skip
