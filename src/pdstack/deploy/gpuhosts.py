"""What can be known to be wrong with the GPU hosts of an inventory and their image, before any host is touched.

The workers themselves (GPUs, engine settings, options) are checked in `trtllm_checks`, the fabric in `fabrics`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdstack.deploy import topology, versions
from pdstack.deploy.fleet import Groups, Hosts, worker_hosts
from pdstack.deploy.problem import Problem, by_value, on, show
from pdstack.deploy.schema import GPU_HOST, is_whole

# What an operator of GPU hosts runs beside us, on these ports unless told otherwise.
FOREIGN_PORTS = {5555: "DCGM's host engine (nv-hostengine)", 9400: "DCGM's exporter (dcgm-exporter)"}
# registry/name:tag or @digest; the registry may have a port.
REFERENCE = re.compile(r"[a-z0-9][A-Za-z0-9._:/-]*(@sha256:[0-9a-f]{64})?")
MOVING_TAGS = ("latest", "main", "nightly", "dev", "edge", "stable")


def problems(groups: Groups, hosts: Hosts, settings: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong; the arguments are those of `validate.problems`."""
    if settings.get("engine") != "trtllm":
        return [*_not_this_engine(settings), *_runtime_needs_engine(settings)]
    workers = {host: hosts[host] for host in worker_hosts(groups) if host in hosts}
    return [
        *_variables(workers),
        *_image(settings),
        *_build_host(groups, settings),
        *_pairs(settings),
        *_other_engine(workers),
    ]


def _variables(workers: Hosts) -> Iterator[Problem]:
    for key, field in GPU_HOST.items():
        for value, names in by_value(workers, key):
            # A GPU count that is none is told with the workers (trtllm_checks), an interface with the fleet.
            if value is None or key == "kv_interface" or (key == "gpu_count" and not is_whole(value)):
                continue
            if (wrong := field.wrong(value)) is not None:
                yield Problem(f"{key}{on(names, workers)}", show(value), wrong, f"correct {key} in the inventory")


def _image(settings: Mapping[str, Any]) -> Iterator[Problem]:
    source, reference = settings.get("trtllm_image_source"), settings.get("trtllm_image")
    archive, push = settings.get("trtllm_archive"), settings.get("trtllm_push")
    if source == "registry" and isinstance(reference, str):
        yield from _reference(reference, settings)
    if source == "archive" and isinstance(archive, str):
        if not archive:
            yield Problem(
                "trtllm_archive (trtllm_image_source is archive)", "nothing", "a file on the controller",
                "set trtllm_archive to what `docker save` wrote, or trtllm_image_source: build",
            )  # fmt: skip
        elif not Path(archive).is_file():
            yield Problem(
                "trtllm_archive (trtllm_image_source is archive)", f"no file {archive} on the controller",
                "a file that `docker save` wrote",
                "copy it there, or correct the path (absolute, or from where nox runs)",
            )  # fmt: skip
    if isinstance(push, str) and push:
        if source != "build":
            yield Problem(
                f"trtllm_push (trtllm_image_source is {source})", show(push), "nothing: only what is built is pushed",
                "remove trtllm_push, or set trtllm_image_source: build",
            )  # fmt: skip
        elif "://" in push or "@" in push or (":" in push.rsplit("/", 1)[-1].partition("/")[0] and "/" in push):
            yield Problem(
                "trtllm_push", show(push), "a registry and a path, for example registry.site:5000/ai",
                "remove the scheme, tag or digest: the tag is made of the image's content",
            )  # fmt: skip


def _reference(reference: str, settings: Mapping[str, Any]) -> Iterator[Problem]:
    what = "trtllm_image (trtllm_image_source is registry)"
    if not reference:
        yield Problem(
            what, "nothing", "an image of the runtime, pinned by tag or digest",
            "set trtllm_image, for example registry.site/ai/tensorrtllm-runtime:0.7.0.post1",
        )  # fmt: skip
        return
    if not REFERENCE.fullmatch(reference):
        yield Problem(what, show(reference), "registry/name:tag or registry/name@sha256:...", "correct trtllm_image")
        return
    if "@sha256:" in reference:
        return
    tag = reference.rsplit("/", 1)[-1].partition(":")[2]
    if not tag or tag in MOVING_TAGS:
        yield Problem(
            what, f"{reference}, {'a tag that moves' if tag else 'no tag'}", "an image pinned by tag or digest",
            "add the version's tag or the digest: two hosts that pull on two days must get the same image",
        )  # fmt: skip
        return
    pinned = settings.get("versions")
    wanted = str(pinned.get("dynamo", "")) if isinstance(pinned, Mapping) else ""
    release = versions.parse(tag)
    if release is not None and versions.parse(wanted) not in (None, release):
        yield Problem(
            what, f"{reference}, Dynamo {tag}", f"Dynamo {wanted} (versions.dynamo)",
            f"take the image of {wanted}, or change versions.dynamo and versions.tensorrt_llm together",
        )  # fmt: skip


def _build_host(groups: Groups, settings: Mapping[str, Any]) -> Iterator[Problem]:
    builders = list(groups.get("image_build", ()))
    if len(builders) > 1:
        yield Problem(
            "group image_build", f"{len(builders)} hosts ({', '.join(builders)})", "one host, or none",
            "keep one; without any, the first GPU host builds the image",
        )  # fmt: skip
    elif builders and settings.get("trtllm_image_source") != "build":
        yield Problem(
            f"group image_build (trtllm_image_source is {settings.get('trtllm_image_source')})", builders[0],
            "no host: nothing is built", "empty the group, or set trtllm_image_source: build",
        )  # fmt: skip


def _pairs(settings: Mapping[str, Any]) -> Iterator[Problem]:
    pinned = settings.get("versions")
    if not isinstance(pinned, Mapping):
        return
    for what, found, wanted, fix in versions.contradictions(pinned):
        yield Problem(what, found, wanted, fix)


def _other_engine(workers: Hosts) -> Iterator[Problem]:
    for value, names in by_value(workers, "engine_settings"):
        if value:
            yield Problem(
                f"engine_settings{on(names, workers)} (engine is trtllm)", show(value),
                "nothing: these are settings of the reference engine",
                "remove it; TensorRT-LLM's settings go into trtllm_engine",
            )  # fmt: skip


def _not_this_engine(settings: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("trtllm_engine", "trtllm_args"):
        if settings.get("engine") == "reference" and isinstance(settings.get(key), Mapping) and settings[key]:
            yield Problem(
                f"{key} (engine is reference)", show(settings[key]), "nothing: it is for TensorRT-LLM",
                "set engine: trtllm, or remove it",
            )  # fmt: skip


def _runtime_needs_engine(settings: Mapping[str, Any]) -> Iterator[Problem]:
    if settings.get("engine") == "reference" and settings.get("coordination_image") == "runtime":
        yield Problem(
            "coordination_image (engine is reference)", "'runtime'", "own: only engine trtllm has the runtime image",
            "set coordination_image: own, or engine: trtllm",
        )  # fmt: skip


def port_problems(built: topology.Topology) -> list[Problem]:
    """Return the ports of GPU hosts that are known to be another program's."""
    if built["engine"] != "trtllm":
        return []
    gpus = {worker["host"] for worker in built["workers"]}
    return [
        Problem(
            f"port {use['port']} on {use['host']}", f"{use['service']}, where {FOREIGN_PORTS[use['port']]} listens",
            "another port", "change it in pdstack_ports, or set another pdstack_port_offset",
        )
        for use in topology.port_uses(built)
        if use["host"] in gpus and use["port"] in FOREIGN_PORTS
    ]  # fmt: skip


def unused(groups: Groups, hosts: Hosts, settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every GPU host with GPUs that no worker has."""
    if settings.get("engine") != "trtllm":
        return []
    found = []
    for host in worker_hosts(groups):
        count = hosts[host].get("gpu_count")
        used = {gpu for role in topology.ROLES if host in groups.get(role, ()) for gpu in _gpus(hosts[host], role)}
        if is_whole(count) and len(used) < count:
            free = [str(gpu) for gpu in range(count) if gpu not in used]
            found.append(f"{host}: {len(free)} of its {count} GPUs have no worker ({', '.join(free)})")
    return found


def _gpus(variables: Mapping[str, Any], role: str) -> Sequence[int]:
    return [gpu for item in topology.worker_items(variables, role) for gpu in item.get("gpus") or ()]
