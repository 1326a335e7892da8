"""One served model over several ways to move KV, side by side: `nox -s ab -- ucx nixl shared`.

Each name is a backend (ucx, nixl: the library that carries bytes between hosts) or a path of the agents (shared, cma,
stream, auto: then the backend beside it is ucx). Every one gets a deployment of its own, all at the same time, and they
answer the same prompts in turn. Medians over all rounds, with the smallest and largest value:

    TTFT          from the request to its first token
    ITL           between two tokens of an answer (the median of each answer)
    KV GB/s       10^9 bytes a second while bytes were moving (and were hashed, where the copy's own pass hashes)
    added ms      TTFT less the time that prefill computed: frontend, hops, and what of the transfer did not hide
    CPU s         processor time of both workers for one request
    idle core     processor time of both workers a second, while nobody asks

    python -m benchmarks.ab ucx nixl --model DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.integration.processes import Stack

from benchmarks.serving import Deployment, Timing, ask, cpu_seconds, model_of, prompts, record_of, served

BACKENDS = ("ucx", "nixl")
IDLE_S = 5.0
COLUMNS = ("TTFT s", "ITL ms", "KV GB/s", "added ms", "CPU s", "idle core")


def figures(stack: Stack, timing: Timing, cpu: float) -> dict[str, float]:
    """The figures of one request. KV GB/s only if bytes moved."""
    decode, prefill = (record_of(stack, f"{role}-0", timing.request_id) for role in ("decode", "prefill"))
    moved = decode["transfer"]
    found = {
        "TTFT s": timing.first,
        "ITL ms": statistics.median(timing.gaps) * 1e3,
        "added ms": (timing.first - prefill["prefill_seconds"]) * 1e3,
        "CPU s": cpu,
    }
    if moved["read_seconds"]:
        found["KV GB/s"] = moved["bytes"] / moved["read_seconds"] / 1e9
    return found


def measure(model: Path, names: list[str], tokens: int, answer: int, rounds: int, threads: int) -> dict[str, Any]:
    """All samples by deployment and column, and over which transports the bytes went."""
    wanted = [
        Deployment(name, name) if name in BACKENDS else Deployment(name, BACKENDS[0], path=name) for name in names
    ]
    engine = {"threads": threads, "max_context": tokens + answer + 64, "kv_blocks": 512}
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    with served(model, wanted, engine) as stacks:
        warm, *rest = prompts(model, tokens, 1 + rounds)
        for stack in stacks.values():
            ask(stack, warm, answer)
        for turn, prompt in enumerate(rest):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                before = cpu_seconds(stacks[name])
                timing = ask(stacks[name], prompt, answer)
                found = figures(stacks[name], timing, cpu_seconds(stacks[name]) - before)
                for column, value in found.items():
                    samples[name][column].append(value)
        before_idle = {name: cpu_seconds(stack) for name, stack in stacks.items()}
        time.sleep(IDLE_S)  # the length of the measurement
        for name, stack in stacks.items():
            samples[name]["idle core"].append((cpu_seconds(stack) - before_idle[name]) / IDLE_S)
        ways = {
            name: sorted({way for peer in stack.workers["decode-0"].transfer()["peers"] for way in peer["transports"]})
            for name, stack in stacks.items()
        }
    return {"samples": samples, "transports": ways}


def table(samples: dict[str, dict[str, list[float]]], transports: dict[str, list[str]]) -> str:
    """One line a deployment: median (smallest to largest)."""
    lines = [f"{'':10}" + "".join(f"{column:>26}" for column in COLUMNS) + "  over"]
    for name, columns in samples.items():
        cells = []
        for column in COLUMNS:
            values = columns.get(column) or [float("nan")]
            text = f"{statistics.median(values):.3f}"
            if len(values) > 1:
                text += f" ({min(values):.3f}-{max(values):.3f})"
            cells.append(f"{text:>26}")
        lines.append(f"{name:10}" + "".join(cells) + "  " + ", ".join(transports[name]))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="ucx, nixl, shared, cma, stream, auto")
    parser.add_argument("--model", type=Path, help="a model's directory; default: the largest deployed here")
    parser.add_argument("--tokens", type=int, default=1000, help="of the prompt")
    parser.add_argument("--answer", type=int, default=24, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with model_of(arguments.model) as model:
        found = measure(model, arguments.names, arguments.tokens, arguments.answer, arguments.rounds, arguments.threads)
    print(f"{arguments.tokens} prompt and {arguments.answer} answer tokens, {arguments.rounds} rounds, in turn")
    print(table(found["samples"], found["transports"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
