"""What a worker's log says of its KV path: which transceiver TensorRT-LLM made, and which transports UCX chose.

With `UCX_PROTO_INFO=y` UCX logs a table for every connection, operation and kind of memory when it chooses protocols;
the row of a message's size names the transport. The tables of several processes and threads lie between each other in
the log of one container: UCX begins each line with host, process and thread, by which they are told apart.
Formats: UCX 1.19 (title on one line) and 1.21 (on two). Plain Python without dependencies, also for hosts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What a KV transfer moves at once: far beyond every threshold of a protocol.
KV_BYTES = 1 << 20
UCX_LINE = "Using UCX kv-cache transceiver"
NIXL_LINES = ("NixlTransferAgent::NixlTransferAgent mAddress", "NIXL Connection Manager created")
BUFFER_LINE = "CacheTransBufferManager"
# Said by what copies between GPU and host on one side; it carries nothing to a peer.
LOCAL = ("cuda_copy", "gdr_copy", "self")

_PREFIX = re.compile(r"\[(?P<at>\d+\.\d+)\] \[(?P<who>[^\]]+)\]\s*(?P<rest>.*)$")
_TITLE = re.compile(
    r"\|\s+(?P<context>\S+)\s+(?P<scope>self|intra-node|inter-node)\s+cfg#\d+\s*(?:\|\s*(?P<title>.*?)\s*)?\|$"
)
_ROW = re.compile(
    r"\|\s+(?P<low>\d+[KMG]?)(?:\.\.(?P<high>\d+[KMG]?|inf))?\s+\|\s+(?P<how>.*?)\s+\|\s+(?P<config>.*?)\s+\|$"
)
_TEXT = re.compile(r"\|\s+(?P<text>.*?)\s+\|$")
_LANE = re.compile(r"([a-z][a-z0-9_]*)/")
_MEMORY = re.compile(r"\b(?:from|into|to) (?P<kind>host|cuda-managed|cuda|rdma|rocm)")
_WARNING = re.compile(r"UCX\s+(?P<level>WARN|ERROR|FATAL)\s+(?P<text>.*)$")
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Choice:
    """One row of a table: messages of `low` to `high` bytes of `operation` go `how` over `transports`."""

    process: str
    scope: str  # self, intra-node or inter-node
    operation: str  # the title, e.g. "remote memory read by ucp_get* into cuda/GPU0 memory from cuda"
    memory: tuple[str, ...]  # kinds of memory in it, e.g. ("cuda",)
    low: int
    high: float
    how: str
    transports: tuple[str, ...]  # e.g. ("rc_mlx5",); several carry parts of one message


def choices(log: str) -> list[Choice]:
    """Return every row of every protocol table in a log, in the order in which they end; other lines are skipped."""
    open_tables: dict[str, tuple[str, str]] = {}
    found: list[Choice] = []
    for line in log.splitlines():
        prefix = _PREFIX.search(line)
        who, rest = (prefix["who"].replace(" ", ""), prefix["rest"]) if prefix else ("", line)
        at = rest.find("|")
        if at < 0:
            continue
        text = rest[at:].rstrip()
        if title := _TITLE.match(text):
            open_tables[who] = (title["scope"], title["title"] or "")
        elif who in open_tables and (row := _ROW.match(text)):
            scope, operation = open_tables[who]
            low = _number(row["low"])
            high = low if row["high"] is None else float("inf") if row["high"] == "inf" else _number(row["high"])
            found.append(
                Choice(
                    who, scope, operation, tuple(dict.fromkeys(_MEMORY.findall(operation))), low, high, row["how"],
                    tuple(dict.fromkeys(_LANE.findall(row["config"]))),
                )
            )  # fmt: skip
        elif who in open_tables and not open_tables[who][1] and (extra := _TEXT.match(text)):
            open_tables[who] = (open_tables[who][0], extra["text"])
    return found


def _number(text: str) -> int:
    return int(text[:-1]) * _UNIT[text[-1]] if text[-1] in _UNIT else int(text)


def by_memory(found: Iterable[Choice], nbytes: int = KV_BYTES) -> dict[str, tuple[str, ...]]:
    """Return the transports that messages of `nbytes` to another process go over, by kind of memory, sorted."""
    result: dict[str, set[str]] = {}
    for choice in found:
        if choice.scope != "self" and choice.low <= nbytes <= choice.high:
            carrying = [name for name in choice.transports if name not in LOCAL] or choice.transports
            for kind in choice.memory or ("host",):
                result.setdefault(kind, set()).update(carrying)
    return {kind: tuple(sorted(names)) for kind, names in sorted(result.items())}


def kv_choices(found: Sequence[Choice], nbytes: int = KV_BYTES) -> list[Choice]:
    """Return the choices that KV is moved by.

    Those between GPU memory and GPU memory (UCX also plans writes from the host to a peer's GPU, which KV never makes);
    where there are none (a machine without a GPU), those of one-sided reads and writes: the messages between the
    workers' control parts are of host memory too, and are none of it.
    """
    fitting = [choice for choice in found if choice.scope != "self" and choice.low <= nbytes <= choice.high]
    gpu = [choice for choice in fitting if choice.memory and all(kind.startswith("cuda") for kind in choice.memory)]
    if gpu:
        return gpu
    reads = [choice for choice in fitting if "ucp_get" in choice.operation]
    return reads or [choice for choice in fitting if "ucp_put" in choice.operation]


def kv_transports(log: str, nbytes: int = KV_BYTES) -> tuple[str, ...]:
    """Return the transports that UCX chose for KV, sorted; empty if the log does not say."""
    chosen = kv_choices(choices(log), nbytes)
    names = {name for choice in chosen for name in choice.transports}
    return tuple(sorted(names - set(LOCAL) or names))


def transceiver(log: str) -> str | None:
    """Return the KV backend that TensorRT-LLM says it uses (ucx or nixl), None if its log says nothing of it."""
    at = {"ucx": log.rfind(UCX_LINE), "nixl": max(log.rfind(line) for line in NIXL_LINES)}
    name = max(at, key=lambda key: at[key])
    return name if at[name] >= 0 else None


def buffer_tokens(log: str) -> int | None:
    """Return `mMaxNumTokens` of the transfer buffers, None if the log does not say."""
    found = re.findall(BUFFER_LINE + r".*?mMaxNumTokens:\s*(\d+)", log)
    return int(found[-1]) if found else None


def complaints(log: str) -> list[str]:
    """Return UCX's warnings and errors, each once: a misspelt variable, a transport or device that is not there."""
    return list(dict.fromkeys(match["text"] for line in log.splitlines() if (match := _WARNING.search(line))))


def devices(info: str) -> dict[str, list[str]]:
    """Return the transports of a host with their devices.

    From `ucx_info -d`, or, without devices, from what UCX answers to a UCX_TLS that it does not know (with aliases).
    """
    found: dict[str, list[str]] = {}
    transport = ""
    for line in info.splitlines():
        if match := re.match(r"#\s+Transport:\s+(\S+)", line):
            transport = match[1]
            found.setdefault(transport, [])
        elif (match := re.match(r"#\s+Device:\s+(\S+)", line)) and transport:
            found[transport].append(match[1])
        elif match := re.search(r"transport\S* .* not available, please use one or more of: (.*)$", line):
            found |= {name.strip(): [] for name in match[1].split(",")}
    return found


def variables(configuration: str) -> set[str]:
    """Return every variable that UCX knows, from `ucx_info -cf`: those it prints, and the ones that others inherit."""
    own = re.findall(r"^(UCX_[A-Z0-9_]+)=", configuration, re.MULTILINE)
    lines = re.findall(r"^# inherits:\s+(.*)$", configuration, re.MULTILINE)
    return {*own, *(name for line in lines for name in re.findall(r"UCX_[A-Z0-9_]+", line))}


def version(text: str) -> str:
    """Return the version from `ucx_info -v`, nothing if it says none."""
    found = re.search(r"Library version:\s*(\S+)", text)
    return found[1] if found else ""
