"""Gates between versions: which combination of pinned versions and settings cannot work, and why.

The versions are `inventories/common/group_vars/all/versions.yml`; nothing here knows a number that is not a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

# TensorRT-LLM's NIXL transceiver first serves with this release; earlier ones accept the setting and move KV by MPI.
NIXL_NEEDS_TENSORRT_LLM = "1.2.0rc3"
# What the releases of ai-dynamo require (`tensorrt-llm==...` of the extra trtllm). Another one is replaced when the
# image is built, or fails when a worker starts.
DYNAMO_PINS = {"0.7.0": "1.2.0rc2", "0.7.0.post1": "1.2.0rc3", "0.7.1": "1.2.0rc3"}
# The oldest releases that were run with Dynamo 0.7.
ETCD_MINIMUM = "3.4"
NATS_MINIMUM = "2.9"
# The CUDA of the image needs this driver branch on the host.
DRIVER_OF_CUDA = {12: 525, 13: 580}

Contradiction = tuple[str, str, str, str]


def parse(text: str) -> Version | None:
    """Return `text` as a PEP 440 version, or None when it is none."""
    try:
        return Version(text)
    except InvalidVersion:
        return None


def nixl_allowed(tensorrt_llm: str) -> bool:
    """Return whether this TensorRT-LLM can move KV by NIXL; False also for what is no version."""
    version = parse(tensorrt_llm)
    return version is not None and version >= Version(NIXL_NEEDS_TENSORRT_LLM)


def below(found: str, minimum: str) -> bool:
    """Return whether `found` is older than `minimum`, or no version; a package's revision (-1) does not count."""
    version, wanted = parse(found.partition("-")[0]), parse(minimum.partition("-")[0])
    return version is None or (wanted is not None and version < wanted)


def contradictions(pinned: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Return what of `versions` cannot be deployed with engine trtllm, as (what, found, wanted, fix)."""
    yield from _pair(str(pinned.get("dynamo", "")), str(pinned.get("tensorrt_llm", "")))
    runtime, gpu = pinned.get("trtllm_runtime"), pinned.get("gpu")
    if isinstance(runtime, Mapping):
        yield from _runtime(str(pinned.get("dynamo", "")), runtime)
    if isinstance(gpu, Mapping):
        yield from _host(gpu, runtime if isinstance(runtime, Mapping) else {})


def _pair(dynamo: str, tensorrt_llm: str) -> Iterator[Contradiction]:
    wanted = DYNAMO_PINS.get(dynamo)
    if wanted is None:
        yield (
            "versions.dynamo", repr(dynamo), f"one of {', '.join(DYNAMO_PINS)} (engine is trtllm)",
            "set it to one of them: options and engine fields are checked against these releases",
        )  # fmt: skip
    elif parse(tensorrt_llm) != parse(wanted):
        fitting = [release for release, pin in DYNAMO_PINS.items() if parse(pin) == parse(tensorrt_llm)]
        other = f", or versions.dynamo to {' or '.join(fitting)}" if fitting else ""
        yield (
            f"versions.dynamo {dynamo} with versions.tensorrt_llm", repr(tensorrt_llm),
            f"{wanted}, which ai-dynamo {dynamo} pins", f"set versions.tensorrt_llm to {wanted}{other}",
        )  # fmt: skip


def _runtime(dynamo: str, runtime: Mapping[str, Any]) -> Iterator[Contradiction]:
    ref = str(runtime.get("ref", ""))
    release = parse(ref.removeprefix("v")) if ref.startswith("v") else None
    if release is not None and release != parse(dynamo):
        yield (
            "versions.trtllm_runtime.ref", repr(ref), f"v{dynamo} (versions.dynamo), or a commit",
            "change the two together: the image would hold another Dynamo than the one that is checked for",
        )  # fmt: skip
    for key, minimum in (("etcd", ETCD_MINIMUM), ("nats", NATS_MINIMUM)):
        if below(str(runtime.get(key, "")), minimum):
            yield (
                f"versions.trtllm_runtime.{key}", repr(runtime.get(key)), f"{minimum} or later",
                f"set it to what the image has (`{'etcd' if key == 'etcd' else 'nats-server'} --version` in it)",
            )  # fmt: skip


def _host(gpu: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[Contradiction]:
    branch, driver = str(gpu.get("driver_branch", "")), str(gpu.get("driver", ""))
    if driver.partition(".")[0] != branch:
        yield (
            "versions.gpu.driver", repr(driver), f"a release of branch {branch} (versions.gpu.driver_branch)",
            "change the two together: packages are pinned by the branch",
        )  # fmt: skip
    cuda = str(runtime.get("cuda", "")).partition(".")[0]
    needed = DRIVER_OF_CUDA.get(int(cuda)) if cuda.isdigit() else None
    if needed is not None and not (branch.isdigit() and int(branch) >= needed):
        yield (
            "versions.gpu.driver_branch", repr(branch), f"{needed} or later: the image has CUDA {runtime.get('cuda')}",
            f"set versions.gpu.driver_branch to {needed}; containers of that CUDA do not start with an older driver",
        )  # fmt: skip
    for key in ("driver", "toolkit"):
        minimum = str(gpu.get(f"{key}_minimum", ""))
        if below(str(gpu.get(key, "")), minimum):
            yield (
                f"versions.gpu.{key}", repr(gpu.get(key)), f"{minimum} or later (versions.gpu.{key}_minimum)",
                f"raise versions.gpu.{key}",
            )  # fmt: skip
