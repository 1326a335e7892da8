"""The runtime image of engine trtllm: how it is named and built, what is refused before, and what must be in it.

Flags of Dynamo's `container/build.sh` are data (a mapping of option to value); the tag is a hash over all that decides
what the build makes. What is in a finished image is read inside it by pdstack.deploy.runtime_probe, and judged here.
Facts on upstream's script and versions: ai-dynamo/dynamo, container/build.sh and container/Dockerfile.trtllm of 0.7.x.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdstack.deploy import image_tag
from pdstack.deploy.problem import Problem, show
from pdstack.deploy.versions import NIXL_NEEDS_TENSORRT_LLM, nixl_allowed, parse

NAME = "trtllm-runtime"
CANDIDATE = "trtllm-candidate"
SOURCES = ("build", "registry", "archive")

# Every option that build.sh of 0.7.x takes, and whether a value follows.
OPTIONS = dict.fromkeys(
    (
        "platform", "framework", "tensorrtllm-pip-wheel", "tensorrtllm-index-url", "tensorrtllm-pip-wheel-dir",
        "tensorrtllm-git-url", "tensorrtllm-commit", "base-image", "base-image-tag", "target", "dev-image", "uid",
        "gid", "build-arg", "build-context", "cache-from", "cache-to", "tag", "sccache-bucket", "sccache-region",
        "vllm-max-jobs",
    ),
    True,
) | dict.fromkeys(
    ("no-cache", "dry-run", "no-tag-latest", "enable-kvbm", "make-efa", "use-sccache"),
    False,
)  # fmt: skip
# Options of other releases, which end the script with 1.
GONE = ("use-default-experimental-tensorrtllm-commit", "trtllm-use-nixl-kvcache-experimental", "release-build")
# Set by the role, which needs the result under a name of its own.
OURS = ("tag", "no-tag-latest", "dry-run")
# Ways to come by the wheel; the script takes one.
INTENTS = ("tensorrtllm-pip-wheel", "tensorrtllm-pip-wheel-dir", "tensorrtllm-git-url")

_HARD_CODED = re.compile(r"tensorrt_llm-(?P<version>[0-9][0-9A-Za-z.]*)-cp\d+-cp\d+")
_BASH = re.compile(r"version (\d+)\.")
# A Docker client from here on builds with BuildKit through its buildx plugin only.
BUILDX_SINCE = 23
MIB = 1024 * 1024

# --- what is built ----------------------------------------------------------------------------------------------


def flags(wanted: Mapping[str, Any]) -> list[str]:
    """Return options of build.sh as words, in the order of `wanted`: a list repeats its option, true has no value.

    None, false and empty text leave an option out. Raises ValueError for what the script does not know.
    """
    words: list[str] = []
    for name, value in wanted.items():
        if name in GONE:
            raise ValueError(
                f"trtllm_image__flags: found {name}, which build.sh of this release ends with; leave it out"
            )
        if name not in OPTIONS:
            raise ValueError(f"trtllm_image__flags: found {name}; wanted options of build.sh: {', '.join(OPTIONS)}")
        if value is None or value is False or value == "":
            continue
        if OPTIONS[name] == (value is True):
            wants = "a value" if OPTIONS[name] else "true or false"
            raise ValueError(f"trtllm_image__flags.{name}: found {value!r}, wanted {wants}")
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{name}"] if value is True else [f"--{name}", str(each)]
    return words


def merged(wanted: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a site over ours; another way to come by the wheel takes the place of the download."""
    if reserved := sorted(set(extra) & set(OURS)):
        raise ValueError(f"trtllm_image__extra_flags: found {', '.join(reserved)}, which the role sets; leave it out")
    replaced = [name for name in INTENTS if extra.get(name)]
    kept = {name: value for name, value in wanted.items() if not replaced or name not in INTENTS}
    return {**kept, **extra}


def plan(
    wanted: Mapping[str, Any],
    extra: Mapping[str, Any],
    *,
    source: Mapping[str, Any],
    versions: Mapping[str, Any],
    push: str = "",
    prefix: str = "pdstack",
) -> dict[str, Any]:
    """Say what to build: `argv`, and from which `inputs`; `wheel` is the one that is downloaded (or empty).

    `ref` names the image once it is good, `candidate` until it has been looked into, `tag` is their common tag.

    `source` is repository, git ref and commit (empty: whatever the ref names); `versions` are those of tensorrt_llm and
    dynamo. `push` is a registry prefix, which becomes the first part of the reference. Raises ValueError for bad flags.
    """
    chosen = merged(wanted, extra)
    inputs = {"source": dict(source), "flags": flags(chosen), "versions": dict(versions)}
    tag = f"{str(versions['tensorrt_llm']).replace('+', '_')}-{image_tag.tag(inputs)}"
    candidate = f"{prefix}/{CANDIDATE}:{tag}"
    return {
        "ref": f"{(push or prefix).rstrip('/')}/{NAME}:{tag}",
        "candidate": candidate,
        "argv": ["bash", "./container/build.sh", *inputs["flags"], "--no-tag-latest", "--tag", candidate],
        "inputs": inputs,
        "tag": tag,
        "wheel": str(chosen.get("tensorrtllm-pip-wheel") or ""),
    }


def archive_reference(archive: str, prefix: str = "pdstack") -> str:
    """Return the name that the image of an archive gets: by the checksum beside the file, else by name, size and time.

    Reading tens of GB at every run would buy little; `FILE.sha256` (as sha256sum writes it) says more, for free.
    """
    file = Path(archive)
    checksum = archive_checksum(archive)
    if checksum:
        return f"{prefix}/{NAME}:archive-{checksum[: image_tag.TAG_LENGTH]}"
    known = file.stat() if file.is_file() else None
    return f"{prefix}/{NAME}:archive-{image_tag.tag([file.name, known and [known.st_size, known.st_mtime_ns]])}"


def archive_checksum(archive: str) -> str:
    """Return the SHA-256 (hex) that `ARCHIVE.sha256` tells, or nothing."""
    beside = Path(f"{archive}.sha256")
    words = beside.read_text().split() if beside.is_file() else []
    return words[0].lower() if words and re.fullmatch(r"[0-9a-fA-F]{64}", words[0]) else ""


def pinned(reference: str) -> bool:
    """Return whether a reference names one image: by digest, or by a tag that is not a moving one."""
    if "@sha256:" in reference:
        return True
    tag = reference.rpartition("/")[2].partition(":")[2]
    return bool(tag) and tag not in ("latest", "main", "nightly", "dev")


def reference(source: str, build: Mapping[str, Any], image: str, archive: str) -> str:
    """Return the reference that all hosts end with, for each source of the image."""
    if source == "registry":
        return image
    if source == "archive":
        return archive_reference(archive)
    return str(build["ref"])


# --- what is refused before anything is done --------------------------------------------------------------------


def setting_problems(
    source: str, *, image: str, archive: str, tensorrt_llm: str, backend: str, build_host: str, hosts: Sequence[str]
) -> Iterator[Problem]:
    """Yield what is wrong with the settings; needs no host. `hosts` are those of the play."""
    if source not in SOURCES:
        yield Problem(
            "trtllm_image_source",
            show(source),
            f"one of {', '.join(SOURCES)}",
            "set it in the inventory's group_vars/all.yml",
        )
    if source == "registry" and not pinned(image):
        yield Problem(
            "trtllm_image", show(image), "an image pinned by digest or by a tag that does not move",
            "set it, for example registry.example.org/ai/tensorrtllm-runtime:0.7.0.post1, or with @sha256:...",
        )  # fmt: skip
    if source == "archive" and not Path(archive or "/").is_file():
        yield Problem(
            "trtllm_archive", show(archive), "a file on the controller that `docker save` wrote, or docker save | gzip",
            "set its path; at a site with a registry use trtllm_image_source: registry",
        )  # fmt: skip
    if source == "build" and build_host not in hosts:
        yield Problem(
            f"build host {build_host}", "not among the hosts of this run", "the host that builds the runtime image",
            "run without --limit, or add the host to it; or name another one in the group image_build",
        )  # fmt: skip
    if backend == "nixl" and not nixl_allowed(tensorrt_llm):
        yield _nixl_gate("versions.tensorrt_llm", tensorrt_llm)


def _nixl_gate(what: str, found: str) -> Problem:
    return Problem(
        f"{what} (kv_transfer_backend is nixl)", show(found), f"{NIXL_NEEDS_TENSORRT_LLM} or newer: earlier ones are "
        "built against NIXL 0.5, whose interface the image's NIXL no longer has",
        f"use tensorrt-llm {NIXL_NEEDS_TENSORRT_LLM} or newer, or kv_transfer_backend: ucx",
    )  # fmt: skip


def host_problems(facts: Mapping[str, Any], *, min_disk_mb: int, cache_dir: str) -> Iterator[Problem]:
    """Yield what keeps a host from building.

    `facts` are texts as the host's programs print them, empty where there is no such program: git, bash (--version),
    docker (version of the client), buildx (its version), df (--block-size=1 --output=target,avail).
    """
    if not facts.get("git"):
        yield Problem(
            "git on the build host", "nothing", "git, to check out Dynamo's source", "install git and git-lfs there"
        )
    bash = _BASH.search(str(facts.get("bash", "")))
    if bash is None or int(bash[1]) < 4:
        yield Problem(
            "bash on the build host", bash[1] if bash else "nothing", "4 or newer, which build.sh is written for",
            "install bash 4 or newer there, or build elsewhere (group image_build)",
        )  # fmt: skip
    docker, buildx = str(facts.get("docker", "")).strip(), str(facts.get("buildx", "")).strip()
    # Without an engine yet there is nothing to say: the hosts step brings one.
    if docker and not buildx and int(docker.split(".")[0] or 0) >= BUILDX_SINCE:
        yield Problem(
            "docker buildx on the build host", f"no buildx beside Docker {docker}",
            "buildx, without which this Docker has no BuildKit",
            "install docker-buildx-plugin (or docker-buildx) there",
        )  # fmt: skip
    for line in str(facts.get("df", "")).splitlines()[1:]:
        target, free = line.rsplit(None, 1)
        if int(free) // MIB < min_disk_mb:
            yield Problem(
                f"disk for the build, {target.strip()}", f"{int(free) // MIB} MiB free", f"{min_disk_mb} MiB",
                f"free some, or mount a larger file system for Docker's data and {cache_dir}; "
                "trtllm_image__min_disk_mb is the limit",
            )  # fmt: skip


def tree_problems(dockerfile: str, script: str, wheel: str, commit: str, wanted_commit: str) -> Iterator[Problem]:
    """Yield what is known to break about a checkout; `wheel` is tensorrt-llm==VERSION, empty if none is downloaded."""
    if wanted_commit and not commit.startswith(wanted_commit):
        yield Problem(
            "the commit of Dynamo's source", commit, f"{wanted_commit}, which is pinned",
            "the ref was moved upstream: look at what changed, then pin the new commit or another ref",
        )  # fmt: skip
    if not script:
        yield Problem(
            "container/build.sh in Dynamo's source", "nothing", "the build script of Dynamo 0.7.x",
            "correct versions.trtllm_runtime.source and ref",
        )  # fmt: skip
    version = wheel.partition("==")[2]
    for found in sorted({match["version"] for match in _HARD_CODED.finditer(_code(dockerfile))}):
        if version and parse(found) != parse(version):
            yield Problem(
                "container/Dockerfile.trtllm in Dynamo's source",
                f"the wheel of {found}, whatever --tensorrtllm-pip-wheel says", f"the wheel of {version}",
                "use a ref that honours the flag (v0.7.0.post1 or newer), or give the wheel as a file: "
                "trtllm_image__extra_flags: {tensorrtllm-pip-wheel-dir: DIR}",
            )  # fmt: skip


def _code(dockerfile: str) -> str:
    return "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))


# --- what must be in the image ----------------------------------------------------------------------------------


def image_problems(
    found: Mapping[str, Any], wanted: Mapping[str, str], *, backend: str, source: str
) -> Iterator[Problem]:
    """Yield what is wrong with a finished image: `found` is what pdstack.deploy.runtime_probe printed inside it.

    `wanted` names versions of tensorrt_llm, dynamo, nixl, ucx, python, etcd and nats; one that is empty is not checked.
    """
    where = "in the finished image"
    tensorrt = found.get("tensorrt_llm") or {}
    version = str(tensorrt.get("module") or tensorrt.get("distribution") or "")
    if not _same(version, wanted.get("tensorrt_llm", "")):
        why = (
            "the wheel flag was ignored by the build script" if source == "build" and version else "it is another image"
        )
        fixes = {
            "build": "use a ref whose Dockerfile.trtllm honours --tensorrtllm-pip-wheel, or give the wheel as a file "
            "(trtllm_image__extra_flags: {tensorrtllm-pip-wheel-dir: DIR})",
            "registry": "set trtllm_image to the image of that version",
            "archive": "set trtllm_archive to the archive of that version",
        }
        yield Problem(f"tensorrt_llm.__version__ {where}", _found(version, why), wanted["tensorrt_llm"], fixes[source])
    elif tensorrt.get("distribution") and not _same(version, tensorrt["distribution"]):
        yield Problem(
            f"tensorrt_llm {where}", f"{version} in version.py and {tensorrt['distribution']} in its metadata", "one",
            "two installations lie over each other: build anew with trtllm_image__extra_flags: {no-cache: true}",
        )  # fmt: skip
    named = {
        "dynamo": (
            "ai-dynamo",
            "correct versions.dynamo or the image: both sides of the request plane must be of one release",
        ),
        "python": ("python", "correct versions.trtllm_runtime.python: the wheel is for that Python only"),
        "ucx": (
            "UCX (ucx_info -v)",
            "correct versions.trtllm_runtime.ucx once you know that this UCX is the one you want",
        ),
        "etcd": ("etcd", "correct versions.trtllm_runtime.etcd, or coordination_image: own"),
        "nats": ("nats-server", "correct versions.trtllm_runtime.nats, or coordination_image: own"),
    }
    for key, (what, fix) in named.items():
        if not _same(str(found.get(key) or ""), wanted.get(key, ""), prefix=key == "python"):
            yield Problem(f"{what} {where}", show(found.get(key)), wanted[key], fix)
    yield from _nixl_problems(found, wanted, where)
    if backend == "nixl" and version and not nixl_allowed(version):
        yield _nixl_gate(f"tensorrt_llm {where}", version)


def _nixl_problems(found: Mapping[str, Any], wanted: Mapping[str, str], where: str) -> Iterator[Problem]:
    packages: Mapping[str, str] = found.get("nixl") or {}
    if wanted.get("nixl") and not any(_same(version, wanted["nixl"]) for version in packages.values()):
        listed = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
        yield Problem(
            f"NIXL {where}", listed or "nothing", wanted["nixl"],
            "do not install another NIXL over the image's; correct versions.trtllm_runtime.nixl if it has this one",
        )  # fmt: skip
    missing = (found.get("nixl_abi") or {}).get("missing") or []
    if missing:
        yield Problem(
            f"libtensorrt_llm_nixl_wrapper.so {where}", f"asks for {missing[0]}, which no libnixl.so of the image has",
            "a wrapper and a NIXL of one interface", "it is built against another NIXL (NVIDIA/TensorRT-LLM#9752): "
            f"use {NIXL_NEEDS_TENSORRT_LLM} or newer, or kv_transfer_backend: ucx",
        )  # fmt: skip


def _found(version: str, why: str) -> str:
    return f"{version} ({why})" if version else "nothing"


def _same(found: str, wanted: str, *, prefix: bool = False) -> bool:
    """Compare versions by PEP 440 where they are such; nothing wanted is always met."""
    if not wanted:
        return True
    if prefix:
        return found == wanted or found.startswith(f"{wanted}.")
    versions = parse(found), parse(str(wanted))
    if versions[0] is None or versions[1] is None:
        return found == wanted
    # 1.2.0rc3+cu130 is a build of 1.2.0rc3.
    return versions[0] == versions[1] or versions[0].public == str(versions[1])


def render(found: Sequence[Problem]) -> str:
    """Return the problems as the text an operator reads, empty for none."""
    return "\n".join(
        f"{each.what}\n   found:  {each.found}\n   wanted: {each.wanted}\n   fix:    {each.fix}" for each in found
    )


def content_digest(inspected: Sequence[Mapping[str, Any]]) -> str:
    """Return a digest over what an image holds and how it starts, from `docker image inspect`; empty for no image.

    An image's id depends on how the engine stores images (the graph drivers' and containerd's ids differ), so hosts
    are compared by this. Raises ValueError when there are no layers: nothing could be compared.
    """
    if not inspected:
        return ""
    image = inspected[0]
    layers = (image.get("RootFS") or {}).get("Layers") or []
    if not layers:
        raise ValueError(f"image {image.get('Id')}: found no layers, wanted what docker image inspect prints")
    config = image.get("Config") or {}
    parts = {key: config.get(key) or None for key in ("Env", "Entrypoint", "Cmd", "User", "WorkingDir")}
    text = json.dumps([layers, image.get("Architecture"), parts], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
