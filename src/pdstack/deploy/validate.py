"""What can be known to be wrong from the inventory alone, before any host is touched.

`problems` returns all of them at once; each says what was looked at, what was found, what was wanted and how to fix it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdstack.deploy import fabrics, fleet, gpuhosts, topology, trtllm_checks, versions
from pdstack.deploy.problem import Problem, by_value, mapping, on, show
from pdstack.deploy.schema import (
    CHOICES,
    ENGINE_SETTINGS,
    FABRIC,
    GPU_HOST,
    GPU_VERSIONS,
    GPU_WORKER,
    MODEL_SOURCES,
    PORTS,
    SCALARS,
    TRANSFER_SETTINGS,
    TRTLLM_ENGINE,
    TRTLLM_RUNTIME,
    VERSIONS,
    WORKER,
    closest,
)

HIGHEST_PORT = 65535
MOST_MEMBERS = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
GROUPS = ("etcd", "nats", "frontend", "prefill", "decode")
# The groups whose hosts belong to a deployment; the last may be empty.
HOST_GROUPS = (*GROUPS, "image_build")

__all__ = ["GROUPS", "HOST_GROUPS", "Problem", "notes", "problems", "render"]


def problems(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Problem]:
    """Return every problem of the inventory, in the order of the settings; an empty list when it can be deployed.

    `groups` maps a group to its hosts, `hosts` a host to its variables, `settings` is `pdstack_settings`.
    """
    found = [*_scalars(settings), *_choices(settings), *_dicts(settings, hosts), *_groups(groups)]
    found += _workers(groups, hosts, settings)
    found += [*_gates(settings, hosts), *fleet.problems(groups, hosts, settings)]
    # The topology can only be derived from settings of the right types; so can what workers make of each other.
    typed = not any(problem.what.startswith(("pdstack_", "prefill_workers", "decode_workers")) for problem in found)
    if typed:
        found += [*_ports(groups, hosts, settings)]
    found += [*gpuhosts.problems(groups, hosts, settings), *_fabrics(groups, hosts, settings, found)]
    if typed and not any(problem.what.startswith(("trtllm_", "kv_transfer_timeout")) for problem in found):
        found += trtllm_checks.problems(groups, hosts, settings)
    # What is wrong with a profile is wrong on every host that uses it.
    return list(dict.fromkeys(found))


def notes(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    """Return what an operator should know of an inventory without problems: it can be meant, or be forgotten."""
    return [*fleet.placeholders(hosts), *gpuhosts.unused(groups, hosts, settings)]


def render(found: Sequence[Problem]) -> str:
    """Return the problems as the text an operator reads."""
    count = f"{len(found)} problem{'s' if len(found) != 1 else ''}"
    lines = [f"The inventory cannot be deployed: {count}. Nothing was changed."]
    for number, problem in enumerate(found, start=1):
        lines += [
            "",
            f"{number}. {problem.what}",
            f"   found:  {problem.found}",
            f"   wanted: {problem.wanted}",
            f"   fix:    {problem.fix}",
        ]
    return "\n".join(lines)


def _scalars(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for key, field in SCALARS.items():
        if (wrong := field.wrong(field.from_command_line(settings.get(key)))) is not None:
            yield Problem(key, show(settings.get(key)), wrong, f"set {key} in the inventory's group_vars/all.yml")
    name = settings.get("pdstack_name")
    if isinstance(name, str) and not NAME.fullmatch(name):
        yield Problem(
            "pdstack_name", show(name), "1 to 32 of a-z, 0-9 and -, beginning and ending with a letter or digit",
            "choose another pdstack_name (it names containers, directories and the Dynamo namespace)",
        )  # fmt: skip
    engine, source = settings.get("engine"), settings.get("model_source")
    if isinstance(engine, str) and engine in MODEL_SOURCES and source in CHOICES["model_source"]:
        sources = MODEL_SOURCES[engine]
        if source not in sources:
            yield Problem(
                f"model_source (engine is {engine})", show(source), f"one of {', '.join(sources)}",
                "set model_source: hub with model_ref and model_revision, or path with the directory in model_ref",
            )  # fmt: skip
    path = settings.get("kv_transfer_path")
    if engine == "trtllm" and path in fabrics.OWN_PATHS:
        yield Problem(
            "kv_transfer_path (engine is trtllm)", show(path), "auto or backend: TensorRT-LLM moves KV by itself",
            "leave kv_transfer_path out; choose what carries KV with kv_transfer_backend and kv_fabric",
        )  # fmt: skip
    if settings.get("model_source") in ("path", "hub") and not settings.get("model_ref"):
        wanted = "a directory on the controller" if settings["model_source"] == "path" else "a repository (owner/name)"
        yield Problem(
            f"model_ref (model_source is {settings['model_source']})",
            "nothing",
            wanted,
            "set model_ref, or model_source: package",
        )


def _choices(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for key, choices in CHOICES.items():
        value = settings.get(key)
        if value not in choices:
            yield Problem(
                key, show(value), f"one of {', '.join(choices)}",
                f"set {key} to one of them{closest(str(value), choices)}",
            )  # fmt: skip


def _dicts(settings: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    yield from mapping("pdstack_ports", settings.get("pdstack_ports"), PORTS)
    yield from mapping("engine_defaults", settings.get("engine_defaults"), ENGINE_SETTINGS)
    yield from mapping("transfer_defaults", settings.get("transfer_defaults"), TRANSFER_SETTINGS)
    yield from mapping("transfer_settings", settings.get("transfer_settings"), TRANSFER_SETTINGS, required=False)
    pinned = settings.get("versions")
    yield from mapping("versions", pinned, VERSIONS)
    if isinstance(pinned, Mapping):
        for key, fields in (("trtllm_runtime", TRTLLM_RUNTIME), ("gpu", GPU_VERSIONS)):
            if isinstance(pinned.get(key), Mapping):
                yield from mapping(f"versions.{key}", pinned[key], fields)
    yield from mapping("trtllm_engine_defaults", settings.get("trtllm_engine_defaults"), TRTLLM_ENGINE)
    yield from mapping("trtllm_engine", settings.get("trtllm_engine"), TRTLLM_ENGINE)
    if not isinstance(settings.get("trtllm_args"), Mapping):
        yield Problem(
            "trtllm_args", show(settings.get("trtllm_args")), "a mapping of options", "write trtllm_args as a mapping"
        )
    fabrics = settings.get("kv_fabrics")
    if not isinstance(fabrics, Mapping):
        yield Problem(
            "kv_fabrics", show(fabrics), "a mapping of profiles", "see inventories/common/group_vars/all/fabrics.yml"
        )
        fabrics = {}
    for name, profile in fabrics.items():
        yield from mapping(f"kv_fabrics.{name}", profile, FABRIC)
    for value, names in by_value(hosts, "engine_settings"):
        yield from mapping(f"engine_settings{on(names, hosts)}", value, ENGINE_SETTINGS, required=False)
    for value, names in by_value(hosts, "kv_fabric"):
        if value not in list(fabrics):
            yield Problem(
                f"kv_fabric{on(names, hosts)}", show(value), f"one of {', '.join(map(str, fabrics))}",
                f"choose a profile of kv_fabrics, or add one{closest(str(value), list(fabrics))}",
            )  # fmt: skip


def _groups(groups: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    for group in GROUPS:
        members = list(groups.get(group, ()))
        if not members:
            yield Problem(
                f"group {group}", "no host", "at least one host",
                f"put a host into the group {group} (a host may be in several groups)",
            )  # fmt: skip
    for group, what in (("etcd", "members"), ("nats", "servers")):
        count = len(groups.get(group, ()))
        if count and count % 2 == 0:
            yield Problem(
                f"group {group}", f"{count} hosts ({', '.join(groups[group])})", "an odd number",
                f"use {count - 1} or {count + 1}: {count} {what} lose their quorum as soon as {count - 1} would",
            )  # fmt: skip
        elif count > MOST_MEMBERS:
            yield Problem(
                f"group {group}", f"{count} hosts", f"1, 3 or {MOST_MEMBERS}",
                f"take {count - MOST_MEMBERS} out: every write waits for a majority, so more {what} are slower",
            )  # fmt: skip


def _workers(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Problem]:
    names: list[tuple[str, str]] = []
    trtllm = settings.get("engine") == "trtllm"
    for role in topology.ROLES:
        count = 0
        for host in groups.get(role, ()):
            key = f"{role}_workers"
            items = hosts[host].get(key)
            if not isinstance(items, Sequence) or isinstance(items, str) or not items:
                yield Problem(
                    f"{key} on {host}", show(items), "a list with an entry per worker, for example [{}]",
                    f"give {host} a {key} list, or take it out of the group {role}",
                )  # fmt: skip
                continue
            for position, item in enumerate(items):
                what = f"{key}[{position}] on {host}"
                yield from mapping(what, item, GPU_WORKER if trtllm else WORKER, required=False)
                if not isinstance(item, Mapping):
                    continue
                if isinstance(item.get("engine"), Mapping) and not trtllm:
                    yield from mapping(f"{what}.engine", item["engine"], ENGINE_SETTINGS, required=False)
                name = item.get("name") or f"{role}-{count}"
                count += 1
                if not isinstance(name, str) or not NAME.fullmatch(name):
                    yield Problem(f"{what}.name", show(name), "1 to 32 of a-z, 0-9 and -", "choose another name")
                names.append((str(name), f"{role} on {host}"))
    for name, times in Counter(name for name, _ in names).items():
        if times > 1:
            places = ", ".join(place for other, place in names if other == name)
            yield Problem(
                f"worker name {name}", f"{times} workers ({places})", "a name used once in the deployment",
                "give each entry of prefill_workers and decode_workers its own name, or none",
            )  # fmt: skip
        if name in ("etcd", "nats", "frontend"):
            yield Problem(
                f"worker name {name}", "the name of another service", "a name of its own", "rename the worker"
            )


def _gates(settings: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    pinned = settings.get("versions")
    release = str(pinned.get("tensorrt_llm", "")) if isinstance(pinned, Mapping) else ""
    if settings.get("kv_transfer_backend") == "nixl" and not versions.nixl_allowed(release):
        yield Problem(
            "kv_transfer_backend nixl", f"tensorrt-llm {release or 'of no version'}",
            f"tensorrt-llm {versions.NIXL_NEEDS_TENSORRT_LLM} or later (PEP 440)",
            "set versions.dynamo and versions.tensorrt_llm to such a pair, or kv_transfer_backend: ucx",
        )  # fmt: skip
    for value, names in by_value(hosts, "engine_settings"):
        if not isinstance(value, Mapping) or not isinstance(settings.get("engine_defaults"), Mapping):
            continue
        effective = {**settings["engine_defaults"], **value}
        chunk, block = effective.get("prefill_chunk"), effective.get("block_size")
        if isinstance(chunk, int) and isinstance(block, int) and block > 0 and chunk % block:
            yield Problem(
                f"engine_settings.prefill_chunk{on(names, hosts)}", str(chunk), f"a multiple of block_size ({block})",
                f"set prefill_chunk to {max(block, chunk // block * block)}",
            )  # fmt: skip


def _ports(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Problem]:
    taken: dict[tuple[str, int], str] = {}
    built = topology.build(groups, hosts, settings)
    for worker in built["workers"]:
        if worker["role"] == "prefill" and worker["index"] >= topology.DECODE_PORTS:
            yield Problem(
                f"prefill workers on {worker['host']}", f"more than {topology.DECODE_PORTS}",
                f"at most {topology.DECODE_PORTS}: the ports from there on are those of decode workers",
                "put some of them on another host",
            )  # fmt: skip
            break
    yield from gpuhosts.port_problems(built)
    for use in topology.port_uses(built):
        host, port, service = use["host"], use["port"], use["service"]
        if not 0 < port <= HIGHEST_PORT:
            yield Problem(
                f"port of {service} on {host}", f"{port} (pdstack_port_offset {settings['pdstack_port_offset']})",
                f"1 to {HIGHEST_PORT}", "choose a smaller pdstack_port_offset, or another number in pdstack_ports",
            )  # fmt: skip
        elif other := taken.get((host, port)):
            yield Problem(
                f"port {port} on {host}", f"two services: {other} and {service}", "one service on a port",
                "change one of them in pdstack_ports",
            )  # fmt: skip
        else:
            taken[host, port] = service


def _fabrics(
    groups: Mapping[str, Sequence[str]],
    hosts: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    found: Sequence[Problem],
) -> Iterator[Problem]:
    """Check the profiles that are used against the engine and the hosts that use them."""
    engine, profiles = settings.get("engine"), settings.get("kv_fabrics")
    if engine not in CHOICES["engine"] or not isinstance(profiles, Mapping):
        return
    for host in fleet.worker_hosts(groups):
        name, devices = hosts[host].get("kv_fabric"), hosts[host].get("kv_net_devices")
        known = isinstance(name, str) and name in profiles
        wrong = any(problem.what.startswith(f"kv_fabrics.{name}") for problem in found)
        if known and not wrong and (devices is None or GPU_HOST["kv_net_devices"].wrong(devices) is None):
            yield from fabrics.problems(str(name), profiles[name], hosts[host], engine=str(engine), host=host)
            if engine == "reference":
                yield from fabrics.path_problems(str(name), profiles[name], str(settings.get("kv_transfer_path")))
