"""Which keys, types and ranges the inventory's variables may have; the data that `validate` works from."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

CHOICES: dict[str, tuple[str, ...]] = {
    "kv_transfer_backend": ("ucx", "nixl"),
    "kv_transfer_path": ("auto", "backend", "shared", "cma", "stream"),
    "router_mode": ("round-robin", "random", "kv"),
    "image_source": ("registry", "build", "auto"),
    "model_source": ("package", "path", "hub", "tiny"),
    "engine": ("reference", "trtllm"),
    "coordination_image": ("own", "runtime", "auto"),
    "trtllm_image_source": ("build", "registry", "archive"),
    "gpu_request": ("auto", "cdi", "runtime"),
}
# Each engine reads its models from other places: TensorRT-LLM has no use for those that are made for the CPU engine.
MODEL_SOURCES: dict[str, tuple[str, ...]] = {
    "reference": ("package", "path", "hub", "tiny"),
    "trtllm": ("path", "hub"),
}


def closest(value: str, choices: Sequence[str]) -> str:
    """Return ` (did you mean 'x'?)` when one of `choices` is near `value`, else nothing."""
    near = difflib.get_close_matches(value, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether `value` is a whole number: true is none, one of an inventory (a class of its own) is."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Field:
    """One key: its kind (int, number, bool, str, list, ints, dict, strings), its range, whether it must be there."""

    kind: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = True

    @property
    def text(self) -> str:
        """What is wanted, in words."""
        words = {
            "int": "a whole number", "number": "a number", "bool": "true or false", "str": "a text",
            "list": "a list of texts", "ints": "a list of whole numbers", "dict": "a mapping",
            "strings": "a mapping of texts",
        }[self.kind]  # fmt: skip
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.minimum is not None and self.maximum is not None:
            return f"{words} from {self.minimum:g} to {self.maximum:g}"
        return words if self.minimum is None else f"{words} of {self.minimum:g} or more"

    def from_command_line(self, value: Any) -> Any:
        """Return a number for a text that is one: `-e name=5` gives Ansible the text "5"."""
        if isinstance(value, str) and self.kind in ("int", "number"):
            with contextlib.suppress(ValueError):
                return int(value) if self.kind == "int" else float(value)
        return value

    def wrong(self, value: Any) -> str | None:
        """Return what is wanted when `value` does not fit, None when it does."""
        fits = {
            "int": isinstance(value, int) and not isinstance(value, bool),
            "number": isinstance(value, int | float) and not isinstance(value, bool),
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
            "list": isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
            "ints": isinstance(value, list | tuple)
            and all(isinstance(item, int) and not isinstance(item, bool) for item in value),
            "dict": isinstance(value, Mapping),
            "strings": isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()),
        }[self.kind]
        if fits and self.choices:
            fits = value in self.choices
        for number in value if fits and self.kind == "ints" else [value]:
            if fits and self.minimum is not None:
                fits = number >= self.minimum
            if fits and self.maximum is not None:
                fits = number <= self.maximum
        return None if fits else self.text


SCALARS: dict[str, Field] = {
    "pdstack_name": Field("str"),
    "pdstack_port_offset": Field("int", 0, 60000),
    "pdstack_uid": Field("int", 1, 2**31 - 1),
    "model_ref": Field("str"),
    "model_name": Field("str"),
    "migration_limit": Field("int", 0, 100),
    "drain_timeout_s": Field("number", 0, 3600),
    "model_revision": Field("str"),
    "trtllm_max_input_tokens": Field("int", 1, 2**24),
    "kv_transfer_timeout_ms": Field("int", 1, 3_600_000),
    "trtllm_image": Field("str"),
    "trtllm_archive": Field("str"),
    "trtllm_push": Field("str"),
    "kv_path_floor": Field("number", 0, 100),
}

PORTS: dict[str, Field] = {
    key: Field("int", 1, 65535)
    for key in (
        "frontend", "etcd_client", "etcd_peer", "nats_client", "nats_cluster", "nats_monitor", "worker_status",
        "worker_transfer", "worker_stream", "worker_ranks", "kv_path",
    )
}  # fmt: skip

ENGINE_SETTINGS: dict[str, Field] = {
    "block_size": Field("int", 1, 1024),
    "kv_blocks": Field("int", 1),
    "max_context": Field("int", 1),
    "max_batch": Field("int", 1, 4096),
    "prefill_chunk": Field("int", 1),
    "queue_limit": Field("int", 0),
    "queue_timeout_s": Field("number", 0, 3600),
    "threads": Field("int", 1, 1024),
    "prefix_cache": Field("bool"),
    "default_max_tokens": Field("int", 1),
}

TRANSFER_SETTINGS: dict[str, Field] = {
    "ticket_ttl_s": Field("number", 1, 3600),
    "read_timeout_s": Field("number", 0.1, 3600),
    "heartbeat_s": Field("number", 0.1, 600),
    "resume_s": Field("number", 0.1, 600),
    "stall_timeout_s": Field("number", 1, 3600),
    "recheck_every": Field("int", 0, 1_000_000),
    "window_bytes": Field("int", 1, 2**47),
    "audit_bytes": Field("int", 4096, 2**40),
    "audit_files": Field("int", 0, 100),
}

FABRIC: dict[str, Field] = {
    "description": Field("str"),
    "env": Field("strings"),
    "pid_mode": Field("str", choices=("private", "host")),
    "ipc_mode": Field("str", choices=("private", "host")),
    "capabilities": Field("list"),
    "ulimits": Field("list"),
    "transports": Field("list"),
    # What a profile of engine trtllm says beside that; a profile without `engines` is for both.
    "engines": Field("list", required=False),
    "scope": Field("str", choices=("host", "network"), required=False),
    "net_devices": Field("str", choices=("none", "rdma", "interface"), required=False),
    "devices": Field("list", required=False),
    "shm_size": Field("str", required=False),
    "gpu_visibility": Field("str", choices=("own", "all"), required=False),
    # Transports that workers of one host may use beside `transports`.
    "same_host": Field("list", required=False),
    "gpu": Field("dict", required=False),
    # Of the reference engine's own paths, those that KV may take, and the least share of the limit that is accepted.
    "paths": Field("list", required=False),
    "floor": Field("number", 0, 1, required=False),
}

WORKER: dict[str, Field] = {
    "name": Field("str", required=False),
    "engine": Field("dict", required=False),
    "env": Field("strings", required=False),
}
# An entry of engine trtllm; what may stand in `engine` and `args` is in pdstack.deploy.trtllm.
GPU_WORKER: dict[str, Field] = {
    **WORKER,
    "gpus": Field("ints", 0),
    "args": Field("dict", required=False),
}

TRTLLM_ENGINE: dict[str, Field] = {
    "common": Field("dict", required=False),
    "prefill": Field("dict", required=False),
    "decode": Field("dict", required=False),
}

# Variables of a GPU host.
GPU_HOST: dict[str, Field] = {
    "gpu_count": Field("int", 1, 16),
    "kv_net_devices": Field("list", required=False),
    "kv_interface": Field("str", required=False),
    "kv_mtu": Field("int", 576, 65535, required=False),
}

VERSIONS: dict[str, Field] = {
    "dynamo": Field("str"),
    "tensorrt_llm": Field("str"),
    "nixl": Field("str"),
    "ucx": Field("str"),
    "etcd": Field("str"),
    "nats": Field("str"),
    "trtllm_runtime": Field("strings"),
    "gpu": Field("strings"),
    "wheels": Field("dict"),
    "images": Field("dict"),
    "collections": Field("dict"),
    "models": Field("dict"),
}

TRTLLM_RUNTIME: dict[str, Field] = {
    **{key: Field("str") for key in ("source", "ref", "nixl", "ucx", "etcd", "nats", "cuda", "python")},
    # The commit that `ref` must be: a tag can be moved.
    "commit": Field("str", required=False),
}

GPU_VERSIONS: dict[str, Field] = {
    key: Field("str")
    for key in (
        "driver_branch", "driver_minimum", "driver", "toolkit", "toolkit_minimum", "docker_minimum", "docker_cdi",
    )
}  # fmt: skip
