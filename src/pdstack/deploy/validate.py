"""What can be known to be wrong from the inventory alone, before any host is touched.

`problems` returns all of them at once; each says what was looked at, what was found, what was wanted and how to fix it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdstack.deploy import topology, versions
from pdstack.deploy.problem import Problem, show
from pdstack.deploy.schema import (
    CHOICES,
    ENGINE_SETTINGS,
    FABRIC,
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
    Field,
    closest,
)

HIGHEST_PORT = 65535
MOST_MEMBERS = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
GROUPS = ("etcd", "nats", "frontend", "prefill", "decode")
# The groups whose hosts belong to a deployment; the last may be empty.
HOST_GROUPS = (*GROUPS, "image_build")

__all__ = ["GROUPS", "HOST_GROUPS", "Problem", "problems", "render"]


def problems(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Problem]:
    """Return every problem of the inventory, in the order of the settings; an empty list when it can be deployed.

    `groups` maps a group to its hosts, `hosts` a host to its variables, `settings` is `pdstack_settings`.
    """
    found = [*_scalars(settings), *_choices(settings), *_dicts(settings, hosts), *_groups(groups)]
    found += _workers(groups, hosts, settings)
    found += [*_gates(settings, hosts), *_one_host_fabrics(groups, settings, hosts)]
    # The topology can only be derived from settings of the right types.
    if not any(problem.what.startswith(("pdstack_", "prefill_workers", "decode_workers")) for problem in found):
        found += [*_ports(groups, hosts, settings)]
    return found


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


def _mapping(what: str, value: object, fields: Mapping[str, Field], required: bool = True) -> Iterator[Problem]:
    """Check a dict variable key by key: no unknown key, no missing one, every value of its type and range."""
    if not isinstance(value, Mapping):
        yield Problem(what, show(value), f"a mapping with the keys {', '.join(fields)}", f"write {what} as a mapping")
        return
    for key in value:
        if key not in fields:
            yield Problem(
                f"{what}.{key}", "an unknown key", f"one of {', '.join(fields)}",
                f"remove it or correct its spelling{closest(str(key), list(fields))}",
            )  # fmt: skip
    for key, field in fields.items():
        if key not in value:
            if required and field.required:
                yield Problem(
                    f"{what}.{key}", "nothing", field.text,
                    f"add it: a dict variable replaces the whole default, copy {what} from inventories/common",
                )  # fmt: skip
        elif (wrong := field.wrong(value[key])) is not None:
            yield Problem(f"{what}.{key}", show(value[key]), wrong, f"correct {what}.{key}")


def _dicts(settings: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    yield from _mapping("pdstack_ports", settings.get("pdstack_ports"), PORTS)
    yield from _mapping("engine_defaults", settings.get("engine_defaults"), ENGINE_SETTINGS)
    yield from _mapping("transfer_defaults", settings.get("transfer_defaults"), TRANSFER_SETTINGS)
    yield from _mapping("transfer_settings", settings.get("transfer_settings"), TRANSFER_SETTINGS, required=False)
    pinned = settings.get("versions")
    yield from _mapping("versions", pinned, VERSIONS)
    if isinstance(pinned, Mapping):
        for key, fields in (("trtllm_runtime", TRTLLM_RUNTIME), ("gpu", GPU_VERSIONS)):
            if isinstance(pinned.get(key), Mapping):
                yield from _mapping(f"versions.{key}", pinned[key], fields)
    yield from _mapping("trtllm_engine_defaults", settings.get("trtllm_engine_defaults"), TRTLLM_ENGINE)
    yield from _mapping("trtllm_engine", settings.get("trtllm_engine"), TRTLLM_ENGINE)
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
        yield from _mapping(f"kv_fabrics.{name}", profile, FABRIC)
    for value, names in _by_value(hosts, "engine_settings"):
        yield from _mapping(f"engine_settings{_on(names, hosts)}", value, ENGINE_SETTINGS, required=False)
    for value, names in _by_value(hosts, "kv_fabric"):
        if value not in list(fabrics):
            yield Problem(
                f"kv_fabric{_on(names, hosts)}", show(value), f"one of {', '.join(map(str, fabrics))}",
                f"choose a profile of kv_fabrics, or add one{closest(str(value), list(fabrics))}",
            )  # fmt: skip


def _by_value(hosts: Mapping[str, Mapping[str, Any]], key: str) -> Iterator[tuple[Any, list[str]]]:
    """Group the hosts by the value they have for `key`, so that a fleet-wide mistake is told once."""
    seen: list[tuple[Any, list[str]]] = []
    for host, variables in hosts.items():
        value = variables.get(key)
        for other, names in seen:
            if other == value:
                names.append(host)
                break
        else:
            seen.append((value, [host]))
    yield from seen


def _on(names: Sequence[str], hosts: Mapping[str, Any]) -> str:
    return "" if len(names) == len(hosts) else f" on {', '.join(names)}"


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
                yield from _mapping(what, item, GPU_WORKER if trtllm else WORKER, required=False)
                if not isinstance(item, Mapping):
                    continue
                if isinstance(item.get("engine"), Mapping) and not trtllm:
                    yield from _mapping(f"{what}.engine", item["engine"], ENGINE_SETTINGS, required=False)
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
            "set versions.tensorrt_llm to such a release, or kv_transfer_backend: ucx",
        )  # fmt: skip
    for value, names in _by_value(hosts, "engine_settings"):
        if not isinstance(value, Mapping) or not isinstance(settings.get("engine_defaults"), Mapping):
            continue
        effective = {**settings["engine_defaults"], **value}
        chunk, block = effective.get("prefill_chunk"), effective.get("block_size")
        if isinstance(chunk, int) and isinstance(block, int) and block > 0 and chunk % block:
            yield Problem(
                f"engine_settings.prefill_chunk{_on(names, hosts)}", str(chunk), f"a multiple of block_size ({block})",
                f"set prefill_chunk to {max(block, chunk // block * block)}",
            )  # fmt: skip


def _one_host_fabrics(
    groups: Mapping[str, Sequence[str]], settings: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]
) -> Iterator[Problem]:
    """A fabric whose only transport is process_vm_readv cannot leave a host."""
    workers = sorted({*groups.get("prefill", ()), *groups.get("decode", ())})
    fabrics = settings.get("kv_fabrics")
    if len(workers) < 2 or not isinstance(fabrics, Mapping):
        return
    for name, _ in _by_value(hosts, "kv_fabric"):
        profile = fabrics.get(name) if isinstance(name, str) else None
        if isinstance(profile, Mapping) and profile.get("transports") == ["cma"]:
            yield Problem(
                f"kv_fabric {name}", f"workers on {', '.join(workers)}",
                "all workers on one host: its transport reads the memory of processes of the same host",
                "set kv_fabric: tcp, or put prefill and decode on one host",
            )  # fmt: skip


def _ports(
    groups: Mapping[str, Sequence[str]], hosts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Problem]:
    taken: dict[tuple[str, int], str] = {}
    for use in topology.port_uses(topology.build(groups, hosts, settings)):
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
