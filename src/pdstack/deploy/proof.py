"""What a deployment must show before it counts as disaggregated: the prompts, the bytes, the tokens, the path.

Pure functions; `tests/testinfra` brings the measurements. A prompt is a list of token ids, so that its length is exact
and both runs get the same input whatever the tokeniser does.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 1500
QUICK_LONGEST = 400
MAX_TOKENS = 8
LABEL = re.compile(r'(\w+)="([^"]*)"')
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a block of KV cache."""

    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json of the Llama family; KeyError when it names no layers or heads."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    def block_bytes(self, block_size: int, dtype: str = "float32") -> int:
        """Return the bytes of one block: keys and values of `block_size` tokens in all layers."""
        return self.layers * 2 * block_size * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def prompt_lengths(context: int, block_size: int, depth: str) -> list[int]:
    """Return the lengths of the prompts, in tokens, each once and in ascending order.

    They lie around the borders where an off-by-one would hide (a block, the prefill chunk) and spread up to 1,500
    tokens or what the context leaves beside the answer. `full` gives at least 20, `quick` only the sharpest six.
    """
    longest = min(LONGEST if depth == "full" else QUICK_LONGEST, context - MAX_TOKENS - 1)
    borders = {1, block_size - 1, block_size, block_size + 1, 129, longest}
    spread = {1 + round((longest - 1) * (step / 15) ** 2) for step in range(16)} if depth == "full" else set()
    extra = {2, 3 * block_size + 1, 127, 128, 255, 256, 257, longest - 1} if depth == "full" else set()
    lengths = sorted(length for length in borders | spread | extra if 1 <= length <= longest)
    if depth == "full" and len(lengths) < 20:
        lengths = sorted({*lengths, *range(3, min(longest, 40))})
    return lengths


def prompts(lengths: Sequence[int], vocabulary: int, seed: int = 20) -> list[list[int]]:
    """Return a prompt of each length; the same arguments give the same token ids."""
    source = random.Random(seed)  # noqa: S311 - test data, no secret
    return [[source.randrange(vocabulary) for _ in range(length)] for length in lengths]


def blocks(tokens: int, block_size: int) -> int:
    """Return how many blocks hold the KV cache of `tokens` tokens."""
    return math.ceil(tokens / block_size)


def expected_bytes(lengths: Iterable[int], block_size: int, block_bytes: int) -> int:
    """Return the bytes that must move from prefill to decode for prompts of these lengths: whole blocks."""
    return sum(blocks(length, block_size) for length in lengths) * block_bytes


def reference_key(deployment: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> str:
    """Return a name for the aggregated run's result that changes with everything that decides it (16 hex digits).

    That is the image, the model and the engine's settings, not where or when it ran.
    """
    parts = [
        deployment["images"]["worker"],
        deployment["model"]["id"],
        deployment.get("engine_settings"),
        list(requests),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]], labels: Sequence[str], most: int = 5
) -> list[str]:
    """Return a line for each answer that is not the wanted one, naming the first token that differs."""
    lines = []
    for want, got, label in zip(wanted, found, labels, strict=True):
        if list(want) == list(got):
            continue
        same = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        lines.append(
            f"{label}: token {same} differs: wanted {list(want[same : same + 4])}, found {list(got[same : same + 4])}"
        )
    if len(lines) > most:
        lines = [*lines[:most], f"... and {len(lines) - most} more"]
    return lines


def transfer_speed(transfers: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the median GB/s of the larger transfers (at least half the largest), None when there is none.

    Small ones show latency, not speed. A transfer has `bytes` and `seconds`.
    """
    known = [entry for entry in transfers if entry["bytes"] and entry["seconds"] > 0]
    if not known:
        return None
    largest = max(entry["bytes"] for entry in known)
    return float(statistics.median(e["bytes"] / e["seconds"] / 1e9 for e in known if 2 * e["bytes"] >= largest))


def samples(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Return the samples of a metric in Prometheus text: (labels, value)."""
    found = []
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        sample, _, rest = head.partition("{")
        if sample == name:
            found.append((dict(LABEL.findall(rest)), float(value)))
    return found


def metric(text: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples whose labels include `labels`; 0 when there is none."""
    return sum(value for found, value in samples(text, name) if labels.items() <= found.items())


def testinfra_spec(host: str, connection: Mapping[str, Any]) -> str:
    """Return how testinfra reaches a host itself, from its Ansible connection variables.

    ValueError for a connection that testinfra would only reach slowly, through Ansible.
    """
    kind = str(connection.get("ansible_connection") or "ssh").rpartition(".")[2]
    address = str(connection.get("ansible_host") or host)
    if kind == "local":
        return "local://"
    if kind == "docker":
        return f"docker://{address}"
    if kind not in ("ssh", "smart"):
        raise ValueError(f"host {host}: found the connection {kind!r}, wanted ssh, local or docker")
    user = connection.get("ansible_user")
    port = connection.get("ansible_port")
    key = connection.get("ansible_ssh_private_key_file")
    sudo = "?sudo=True" if user not in (None, "root") else ""
    identity = f"{'&' if sudo else '?'}ssh_identity_file={key}" if key else ""
    return f"ssh://{f'{user}@' if user else ''}{address}{f':{port}' if port else ''}{sudo}{identity}"
