"""What disaggregation costs the first token: TTFT through prefill and decode over TTFT of one aggregated worker.

Both deployments run at the same time on this machine: engine, model, thread count and prompts are the same, and the
requests alternate. The aggregated worker is the limit: disaggregation can at best add nothing. Blocks move while the
prompt is computed, so that what is left to pay is the second hop, and the blocks of the last chunk. How much that is, a
busy machine hides in the ratio; so `added` is shown as well: TTFT less the time that prefill computed.

    python -m benchmarks.ttft --tokens 1000 --rounds 7
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.serving import Deployment, ask, model_of, prompts, record_of, served


def measure(model: Path, backend: str, path: str, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Run both deployments and return the samples and their medians, in seconds."""
    engine = {"threads": threads, "max_context": tokens + 64, "kv_blocks": 512}
    wanted = [Deployment("disaggregated", backend, path), Deployment("aggregated", None)]
    with served(model, wanted, engine) as stacks:
        warm, *rest = prompts(model, tokens, 1 + rounds)
        for stack in stacks.values():
            ask(stack, warm, 2)
        samples: dict[str, list[float]] = {name: [] for name in stacks}
        added = []
        for turn, prompt in enumerate(rest):
            for name in list(stacks) if turn % 2 else list(stacks)[::-1]:
                timing = ask(stacks[name], prompt, 2)
                samples[name].append(timing.first)
                if name == "disaggregated":
                    computed = record_of(stacks[name], "prefill-0", timing.request_id)["prefill_seconds"]
                    added.append(timing.first - computed)
        transfer = stacks["disaggregated"].workers["decode-0"].transfer()
    ratios = [a / b for a, b in zip(samples["disaggregated"], samples["aggregated"], strict=True)]
    return {
        "backend": backend,
        "path": path,
        "tokens": tokens,
        "threads": threads,
        "samples_s": samples,
        "median_s": {name: statistics.median(values) for name, values in samples.items()},
        "added_s": {"median": statistics.median(added), "min": min(added), "max": max(added)},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "transfer": transfer,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's directory; default: the largest deployed here")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=("ucx", "nixl"), action="append")
    parser.add_argument("--path", default="backend", help="kv_transfer_path; default: the backend")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with model_of(arguments.model) as model:
        for backend in arguments.backend or ["ucx", "nixl"]:
            found = measure(model, backend, arguments.path, arguments.tokens, arguments.rounds, arguments.threads)
            results.append(found)
            over = backend if arguments.path == "backend" else f"{backend}/{arguments.path}"
            print(
                f"{over}: {arguments.tokens} prompt tokens, TTFT split {found['median_s']['disaggregated']:.3f} s,"
                f" aggregated {found['median_s']['aggregated']:.3f} s, ratio {found['ratio']['median']:.3f}"
                f" (min {found['ratio']['min']:.3f}, max {found['ratio']['max']:.3f}, {arguments.rounds} pairs),"
                f" added {found['added_s']['median'] * 1e3:.1f} ms ({found['added_s']['min'] * 1e3:.1f} to"
                f" {found['added_s']['max'] * 1e3:.1f})",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
