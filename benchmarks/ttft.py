"""What disaggregation costs the first token: TTFT through prefill and decode over TTFT of one aggregated worker.

Both stacks run at the same time on this machine, without containers: Dynamo's frontend, etcd and NATS are real, the
engine, model, thread count and prompts are the same, and the requests alternate, so that a slower minute of the machine
slows both. The aggregated worker is the limit: disaggregation can at best add nothing.

    python -m benchmarks.ttft --model /var/lib/pdstack/models/ID --tokens 1000 --rounds 7
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.processes import Coordination, Ports, Stack


def time_to_first_token(stack: Stack, prompt: list[int]) -> float:
    """Seconds from the request to the first token's event; the stream is then read to its end."""
    began = time.monotonic()
    first: float | None = None
    for line in stack.stream(prompt, max_tokens=2, ignore_eos=True):
        if first is None and line.startswith("data: {"):
            first = time.monotonic() - began
    if first is None:
        raise RuntimeError(f"no token came for a prompt of {len(prompt)} tokens")
    return first


def prompts(vocabulary: int, tokens: int, count: int) -> list[list[int]]:
    """Prompts that share no prefix, so that no cache helps either side."""
    source = random.Random(tokens)
    return [[source.randrange(300, vocabulary) for _ in range(tokens)] for _ in range(count)]


def measure(model: Path, backend: str, tokens: int, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Run both stacks and return the samples and their medians, in seconds."""
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    ports = Ports()
    coordination = Coordination(folder, ports)
    coordination.prepare()
    coordination.start()
    engine = {"threads": threads, "max_context": tokens + 64, "kv_blocks": 512}
    split = Stack(folder / "split", ports, coordination, "split", model, backend, engine=engine)
    whole = Stack(folder / "whole", ports, coordination, "whole", model, backend, engine=engine)
    try:
        split.start_frontend("--enforce-disagg")
        split.start_worker("prefill-0", "prefill")
        decode = split.start_worker("decode-0", "decode")
        whole.start_frontend()
        whole.start_worker("aggregated-0", "aggregated")
        for stack in (split, whole):
            stack.wait_serving()
        warm, *rest = prompts(vocabulary, tokens, 1 + rounds)
        for stack in (split, whole):
            time_to_first_token(stack, warm)
        samples: dict[str, list[float]] = {"disaggregated": [], "aggregated": []}
        for turn, prompt in enumerate(rest):
            pair = [("disaggregated", split), ("aggregated", whole)]
            for name, stack in pair if turn % 2 else pair[::-1]:
                samples[name].append(time_to_first_token(stack, prompt))
        transfer = decode.transfer()
    finally:
        for stack in (split, whole):
            stack.stop()
        coordination.stop()
    ratios = [a / b for a, b in zip(samples["disaggregated"], samples["aggregated"], strict=True)]
    return {
        "backend": backend,
        "tokens": tokens,
        "threads": threads,
        "samples_s": samples,
        "median_s": {name: statistics.median(values) for name, values in samples.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "transfer": transfer,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=("ucx", "nixl"), action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for backend in arguments.backend or ["ucx", "nixl"]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(
                measure(arguments.model, backend, arguments.tokens, arguments.rounds, arguments.threads, Path(folder))
            )
        found = results[-1]
        print(
            f"{backend}: {arguments.tokens} prompt tokens, TTFT split {found['median_s']['disaggregated']:.3f} s,"
            f" aggregated {found['median_s']['aggregated']:.3f} s, ratio {found['ratio']['median']:.3f}"
            f" (min {found['ratio']['min']:.3f}, max {found['ratio']['max']:.3f}, {arguments.rounds} pairs)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
