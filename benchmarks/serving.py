"""What the benchmarks of served models share: whole deployments without containers, and one request, timed.

Dynamo's frontend, etcd and NATS are real. Several deployments run at the same time on this machine and are asked in
turn, so that a slower minute of the machine slows all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.processes import Coordination, Ports, Stack, wait_for

from pdstack.models.tiny import write_tiny_model

MODELS = Path("/var/lib/pdstack/models")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Deployment:
    """One to be started: disaggregated over `backend` and `path`, or, with backend None, one aggregated worker."""

    name: str
    backend: str | None
    path: str = "backend"


@dataclass(frozen=True)
class Timing:
    """One streamed request, seconds from its sending: `first` to the first token, `gaps` between the tokens."""

    request_id: str
    first: float
    gaps: list[float]


@contextmanager
def model_of(given: Path | None) -> Iterator[Path]:
    """The model to serve: the one given, else the largest that a deployment has left here, else the tests' tiny one."""
    found = {sum(f.stat().st_size for f in file.parent.iterdir()): file.parent for file in MODELS.glob("*/config.json")}
    with tempfile.TemporaryDirectory() as folder:
        model = given or (found[max(found)] if found else write_tiny_model(Path(folder) / "tiny"))
        print(f"model: {model}", flush=True)
        yield model


@contextmanager
def served(model: Path, wanted: list[Deployment], engine: dict[str, Any]) -> Iterator[dict[str, Stack]]:
    """The deployments, serving, by name; they end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        ports, stacks = Ports(), dict[str, Stack]()
        coordination = Coordination(Path(folder), ports)
        coordination.prepare()
        coordination.start()
        try:
            for each in wanted:
                where = Path(folder) / each.name
                stack = Stack(where, ports, coordination, each.name, model, each.backend or "ucx", engine=engine)
                stacks[each.name] = stack
                if each.backend is None:
                    stack.start_frontend()
                    stack.start_worker("aggregated-0", "aggregated")
                else:
                    stack.start_frontend("--enforce-disagg")
                    for role in ("prefill", "decode"):
                        stack.start_worker(f"{role}-0", role, transfer={"path": each.path})
            for stack in stacks.values():
                stack.wait_serving()
            yield stacks
        finally:
            for stack in stacks.values():
                stack.stop()
            coordination.stop()


def ask(stack: Stack, prompt: list[int], tokens: int) -> Timing:
    """One streamed greedy request for exactly `tokens` tokens."""
    began = time.monotonic()
    times: list[float] = []
    request_id = ""
    for line in stack.stream(prompt, max_tokens=tokens, ignore_eos=True):
        if line.startswith("data: {"):
            times.append(time.monotonic() - began)
            request_id = str(json.loads(line.removeprefix("data: "))["id"]).removeprefix("cmpl-")
        elif line.startswith(("event: error", ": ")):
            raise RuntimeError(f"{stack.namespace}: a prompt of {len(prompt)} tokens was answered with {line}")
    if not times:
        raise RuntimeError(f"{stack.namespace}: no token came for a prompt of {len(prompt)} tokens")
    return Timing(request_id, times[0], [later - earlier for earlier, later in itertools.pairwise(times)])


def record_of(stack: Stack, worker: str, request_id: str) -> dict[str, Any]:
    """What a worker remembers of a request; it does so a moment after the last token."""
    return dict(wait_for(f"{worker} has ended {request_id}", lambda: stack.workers[worker].finished(request_id)))


def prompts(model: Path, tokens: int, count: int) -> list[list[int]]:
    """Prompts that share no prefix, so that no cache helps anybody."""
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    source = random.Random(tokens)
    return [[source.randrange(vocabulary // 100, vocabulary) for _ in range(tokens)] for _ in range(count)]


def cpu_seconds(stack: Stack) -> float:
    """Processor time that the workers of a deployment have used since they started."""
    total = 0
    for worker in stack.workers.values():
        fields = Path(f"/proc/{worker.program.process.pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS
