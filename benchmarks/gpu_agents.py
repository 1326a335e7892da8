"""How fast KV moves between two agents whose pools lie in GPU memory: all of it, from ticket to verified blocks.

A child process is prefill: it exports 1 GiB of blocks in random order. This process is decode: it fetches them to
random places, over the path `cuda_ipc`, and over `staged` with each host path as the carrier. Every block's checksum is
compared by the agent itself, and all bytes once more here. The unit is a device-to-device copy of the same bytes in the
same rounds. "fetch" is the whole call, "read" the part of it in which blocks moved (checksums included), "export" what
prefill pays before (hashing, ticket).

    python3 benchmarks/gpu_agents.py --json gpu_agents.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402  # after the path is set: it runs as a script too

try:
    import torch
except ImportError as missing:
    raise SystemExit(f"{missing} in {sys.executable}: run this on a GPU host whose python3 has torch") from missing

from pdstack.transfer import ClusterKey, KVLayout, Role, Ticket, TransferAgent, TransferConfig  # noqa: E402  # as above
from pdstack.transfer.paths import gpu_ways  # noqa: E402  # as above

NBYTES = 1 << 30
# (block bytes, path, carriers of staged).
CASES = (
    (32 << 10, "cuda_ipc", ()),
    (256 << 10, "cuda_ipc", ()),
    (2 << 20, "cuda_ipc", ()),
    (2 << 20, "staged", ("shared",)),
    (2 << 20, "staged", ("stream",)),
)
ROUNDS, WARM = 7, 2
SEED = 20251124
Record = dict[str, Any]


def layout_of(block_bytes: int) -> KVLayout:
    """1 GiB of such blocks: 16 tokens of 2-byte elements."""
    return KVLayout(NBYTES // block_bytes, 1, 16, 8, block_bytes // (2 * 16 * 8 * 2), "float16")


def filled(layout: KVLayout) -> Any:
    """A pool that any process can make again."""
    generator = torch.Generator(device="cuda").manual_seed(SEED)
    words = torch.randint(-(1 << 62), 1 << 62, (NBYTES // 8,), device="cuda", generator=generator)
    return words.view(torch.float16).view(layout.shape)


async def agent_of(role: Role, layout: KVLayout, pool: Any, path: str) -> Any:
    config = TransferConfig(
        cluster_key=ClusterKey(b"k" * 32), path=path, listen_host="127.0.0.1", listen_port=0, window_bytes=NBYTES
    )
    return await TransferAgent.create(
        role, name=role.value, audience="ns/model", layout=layout, pool=pool, config=config
    )


async def prefill(block_bytes: int, path: str) -> None:
    """Answer each line, a seed, with a ticket for all blocks in an order drawn by it."""
    layout = layout_of(block_bytes)
    agent = await agent_of(Role.PREFILL, layout, filled(layout), path)
    while line := await asyncio.to_thread(sys.stdin.readline):
        blocks = np.random.default_rng(int(line)).permutation(layout.num_blocks).tolist()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ticket = agent.export(line.strip(), blocks, len(blocks) * 16, 1, lambda _request, _why: None)
        seconds = time.perf_counter() - start
        print(json.dumps({"ticket": ticket.to_wire(), "seconds": seconds}), flush=True)
    await agent.close()


@contextmanager
def only(carriers: tuple[str, ...]) -> Iterator[None]:
    """Within, the path staged knows these carriers alone."""
    kept = gpu_ways.CARRIERS
    gpu_ways.CARRIERS = carriers or kept
    try:
        yield
    finally:
        gpu_ways.CARRIERS = kept


def spread(rates: list[float], limit: float) -> Record:
    found = sorted(rates)
    middle = statistics.median(found)
    return {
        "gbs": round(middle, 2), "low": round(found[0], 2), "high": round(found[-1], 2),
        "ratio": round(middle / limit, 4),
    }  # fmt: skip


async def measure(block_bytes: int, path: str, carriers: tuple[str, ...]) -> Record:
    """Of each part GB/s (median, lowest, highest) and the ratio of its median to the copy's."""
    layout = layout_of(block_bytes)
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--child", str(block_bytes), path,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=64 << 20,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    there, pool = filled(layout), torch.zeros(layout.shape, dtype=torch.float16, device="cuda")
    spare = torch.empty_like(pool)
    torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "fetch", "read", "export")}
    with only(carriers):
        agent = await agent_of(Role.DECODE, layout, pool, path)
        for number in range(WARM + ROUNDS):
            child.stdin.write(f"{number}\n".encode())
            answer = json.loads(await child.stdout.readline())
            ticket = Ticket.from_wire(answer["ticket"])
            local = np.random.default_rng(100 + number).permutation(layout.num_blocks).tolist()
            start = time.perf_counter()
            spare.copy_(there)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            report = await agent.fetch(ticket, local)
            end = time.perf_counter()
            if number >= WARM:
                for name, value in (
                    ("copy", middle - start), ("fetch", end - middle), ("read", report.read_seconds),
                    ("export", answer["seconds"]),
                ):  # fmt: skip
                    seconds[name].append(value)
            if report.transport != path:
                raise SystemExit(f"the fetch went over {report.transport}, wanted {path}")
            if not torch.equal(pool[local].view(torch.int16), there[list(ticket.blocks)].view(torch.int16)):
                raise SystemExit(f"wrong bytes arrived over {path}")
        await agent.close()
    child.stdin.close()
    await child.wait()
    rates = {name: [NBYTES / value / 1e9 for value in found] for name, found in seconds.items()}
    limit = statistics.median(rates["copy"])
    return {name: spread(found, limit) for name, found in rates.items()}


def run() -> Record:
    """Measure all cases, printing each."""
    results: Record = {}
    for block_bytes, path, carriers in CASES:
        over = f" over {carriers[0]}" if carriers else ""
        label = f"agents, blocks of {block_bytes}, {path}{over}"
        results[label] = asyncio.run(measure(block_bytes, path, carriers))
        print(label, flush=True)
        for name, found in results[label].items():
            around = f"{found['low']:8.1f} to {found['high']:8.1f}"
            print(f"    {name:16} {found['gbs']:8.1f} GB/s  {around}  {found['ratio']:.3f}", flush=True)
    return results


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        asyncio.run(prefill(int(given.child[0]), given.child[1]))
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: run this on a GPU host, with torch built for CUDA")
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes": NBYTES, "agents": run()}
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
