"""The lab's KV cache transceiver: pdstack's transfer agent, over the UCX environment that the container was given."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from pdstack.engine import Engine
from pdstack.transfer import ClusterKey, KVLayout, Role, TransferAgent, TransferConfig
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm_args import CacheTransceiverConfig

UCX_LINE = (
    "Using UCX kv-cache transceiver. If your devices are not in the same domain, please consider setting "
    "UCX_CUDA_IPC_ENABLE_MNNVL=n, UCX_RNDV_SCHEME=put_zcopy and/or unset UCX_NET_DEVICES upon server hangs."
)
# In the order in which TensorRT-LLM's PyTorch backend asks; NIXL again when none is "1".
SWITCHES = {"TRTLLM_USE_NIXL_KVCACHE": "NIXL", "TRTLLM_USE_UCX_KVCACHE": "UCX", "TRTLLM_USE_MPI_KVCACHE": "MPI"}
BUFFER_BYTES = 536870912
SIOCGIFADDR = 0x8915
counter = itertools.count(0)
# The operator's own wish, before pdstack's agent turns the log on for its own use.
SHOW_UCX = os.environ.get("UCX_PROTO_INFO", "n").lower() in ("y", "1", "on", "yes")
shown = {"at": 0}


def resolve(backend: str) -> str:
    """Return UCX, NIXL or MPI for what the YAML says."""
    if backend != "DEFAULT":
        return backend
    return next((name for switch, name in SWITCHES.items() if os.environ.get(switch) == "1"), "NIXL")


def address(backend: str) -> str:
    """Return the address that peers use: of the interface that TRTLLM_<backend>_INTERFACE names, else the route's."""
    name = os.environ.get(f"TRTLLM_{backend}_INTERFACE", "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if name:
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError as error:
                raise RuntimeError(f"TRTLLM_{backend}_INTERFACE={name}: {error.strerror}") from error
            return socket.inet_ntoa(found[20:24])
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def lab_key(namespace: str) -> ClusterKey:
    """Make the key of the tickets. TensorRT-LLM has none, so there is nothing to configure; a lab keeps no secret."""
    return ClusterKey(hashlib.sha256(f"pdstack lab {namespace}".encode()).hexdigest().encode())


async def create(
    role: Role, engine: Engine, wanted: CacheTransceiverConfig, log: Callable[[str], None]
) -> TransferAgent:
    """Make the agent of a prefill or decode worker, and say what TensorRT-LLM says."""
    backend = resolve(wanted.backend or "DEFAULT")
    if backend == "MPI":
        raise RuntimeError("the MPI kv-cache transceiver needs an MPI world, which the lab has not")
    where, namespace = address(backend), os.environ.get("DYN_NAMESPACE", "dynamo")
    seconds = wanted.kv_transfer_timeout_ms / 1000 if wanted.kv_transfer_timeout_ms else 3600.0
    agent = await TransferAgent.create(
        role,
        # As TensorRT-LLM names its agents: two containers of one host name meet here.
        name=f"{socket.gethostname()}_{os.getpid()}_{next(counter)}",
        audience=namespace,
        layout=KVLayout(**engine.layout_fields),
        pool=engine.pool.array,
        config=TransferConfig(
            cluster_key=lab_key(namespace),
            backend=backend.lower(),
            listen_port=int(os.environ.get("TRTLLM_NIXL_PORT", "0")),
            advertise=where,
            ticket_ttl_s=seconds,
            read_timeout_s=min(seconds, 60.0),
        ),
    )
    if backend == "UCX":
        print(f"[TRT-LLM] [I] {UCX_LINE}", flush=True)
    else:
        port = getattr(agent, "port", 0)
        log(f"NixlTransferAgent::NixlTransferAgent mAddress: {where}:{port}")
        log("NIXL Connection Manager created")
    log(
        f"CacheTransBufferManager: mMaxNumTokens:{wanted.max_tokens_in_buffer or 0}, mRecvBufferCount:2, "
        f"mSendBufferCount:1,mTransferBufferSize:{BUFFER_BYTES}, mPreAllocBufferSize:{BUFFER_BYTES},"
        f"mOnlyUseDynamicBuffer:0, mUseFabricMemory:0 mDataType:0"
    )
    return agent


def check_buffer(tokens: int, wanted: CacheTransceiverConfig | None) -> None:
    """Do what TensorRT-LLM does with a prompt beyond its buffer: UCX takes a dynamic one, NIXL fails."""
    limit = wanted.max_tokens_in_buffer if wanted else None
    if wanted is None or limit is None or tokens <= limit:
        return
    text = f"{tokens} tokens, max_tokens_in_buffer {limit}: may use dynamic buffer which will fail with NIXL backend"
    print(f"[TensorRT-LLM][WARNING] {text}", flush=True)
    if resolve(wanted.backend or "DEFAULT") == "NIXL":
        raise RequestError(text)


def forward_ucx_log() -> None:
    """Print what UCX has said since the last call, if the container's UCX_PROTO_INFO asks for it."""
    file: Any = os.environ.get("UCX_LOG_FILE", "")
    if not SHOW_UCX or not file.startswith("/proc/self/fd/"):
        return
    found = os.pread(int(file.rpartition("/")[2]), 1 << 20, shown["at"])
    shown["at"] += len(found)
    if found:
        print(found.decode(errors="replace").rstrip(), flush=True)
