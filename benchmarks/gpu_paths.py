"""How fast paged KV moves between two processes' memory on one GPU: our kernel beside everything else, and the limit.

A child process, prefill, exports 1 GiB of GPU memory; this process, decode, maps it and reads it in blocks, by the
ways below, in interleaved rounds. Every byte that arrived is compared. The unit is a device-to-device copy of the
same bytes in the same rounds.

    kernel            one Triton kernel reading the peer's pool (pdstack.transfer.gpu)
    kernel+sum        the same with a 64-bit checksum a block in the same pass, equal to the one that prefill takes
    sum               the checksums alone: what prefill does when it exports
    ... host          by the host's clock and not the GPU's: block numbers checked and uploaded, launch, synchronise
    torch             index_select and index_copy_ over the same mapping
    nixl, nixl zcopy  NIXL READ, as it comes and with UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on, 256 MiB, blocks in order, in a
                      pair of processes of its own (with `--nixl`; needs what gpu_fabrics.py needs)

Then copies between different layouts of the same KV, Llama-3.1-8B's shape, and the same KV through two transfer agents
(gpu_agents.py). GB/s are 10^9 bytes of KV a second (each is
read once and written once). Needs python3 with torch, triton, numpy and prometheus-client:

    python3 benchmarks/gpu_paths.py --json gpu_paths.json [--nixl] [--tune]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import numpy as np  # noqa: E402  # after the path is set: it runs as a script too

try:
    import torch
except ImportError as missing:
    raise SystemExit(f"{missing} in {sys.executable}: run this on a GPU host whose python3 has torch") from missing

from pdstack.transfer.gpu import copy, ipc, view  # noqa: E402  # as above
from pdstack.transfer.layout import KVLayout  # noqa: E402  # as above

NBYTES = 1 << 30
SIZES = (4 << 10, 8 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20, 16 << 20)
NIXL_SIZES = (4 << 10, 8 << 10, 32 << 10, 128 << 10, 256 << 10, 1 << 20, 16 << 20)
ROUNDS = 11
SEED = 20251124
# A millisecond at 2 GHz: longer than it takes to queue any of the paths.
BUSY_CYCLES = 2_000_000
# Llama-3.1-8B: 32 layers, 8 KV heads of 128 bfloat16 (2 bytes); 8192 tokens are 1 GiB.
LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 8192

Record = dict[str, Any]


def filled(nbytes: int) -> Any:
    """Return bytes that any process can make again."""
    generator = torch.Generator(device="cuda").manual_seed(SEED)
    words = torch.randint(-(1 << 62), 1 << 62, (nbytes // 8,), device="cuda", generator=generator)
    return words.view(torch.uint8)


def prefill() -> None:
    """Export the pool, then answer each line of block size and places with the checksums of the blocks."""
    pool = filled(NBYTES)
    torch.cuda.synchronize()
    own = copy.pool_of(pool)
    print(ipc.export(*own).to_json(), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        blocks = np.random.default_rng(asked["seed"]).permutation(NBYTES // asked["size"])
        if not asked["mixed"]:
            blocks.sort()
        sums = copy.sum_blocks(own, copy.table(blocks, len(blocks), "exported"), asked["size"])
        print(int(sums.sum()), flush=True)


def timed(call: Callable[[], Any]) -> float:
    """Return seconds on the GPU: what is measured is queued while the GPU is busy, so that no launch is waited for."""
    torch.cuda._sleep(BUSY_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clocked(call: Callable[[], Any]) -> float:
    """Return seconds by the host's clock until the GPU is idle."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds(paths: dict[str, tuple[Callable[[], Any], Callable[[Callable[[], Any]], float]]], nbytes: int) -> Record:
    """Run all paths ROUNDS times after a warm-up, in another order each time.

    Returns of each GB/s (median, lowest, highest) and the ratio of its median to that of `copy`.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    shuffle = random.Random(SEED)
    order = list(paths)
    for number in range(ROUNDS + 2):
        # What runs before leaves its bytes in the L2 cache: nobody always follows the same one.
        shuffle.shuffle(order)
        for name in order:
            call, clock = paths[name]
            took = clock(call)
            if number >= 2:
                times[name].append(took)
    rates = {name: sorted(nbytes / took / 1e9 for took in found) for name, found in times.items()}
    limit = statistics.median(rates["copy"])
    return {
        name: {
            "gbs": round(statistics.median(found), 1), "low": round(found[0], 1), "high": round(found[-1], 1),
            "ratio": round(statistics.median(found) / limit, 3),
        }
        for name, found in rates.items()
    }  # fmt: skip


class Foreign:
    """Mapped memory as torch takes it in."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class Decode:
    """This process's side: the mapping of prefill's pool, our own pool, and what must arrive."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin
        assert child.stdout
        self.child = child
        self.asks, self.answers = child.stdin, child.stdout
        self.mapping = ipc.Mapping(ipc.Export.from_json(self.answers.readline()))
        self.peer = copy.Pool(self.mapping.address, self.mapping.nbytes)
        self.foreign = torch.as_tensor(Foreign(*self.peer), device="cuda")
        self.expected = filled(NBYTES)
        self.target = torch.empty(NBYTES, dtype=torch.uint8, device="cuda")
        self.own = copy.pool_of(self.target)

    def prefill_sum(self, size: int, mixed: bool, seed: int) -> int:
        """Ask prefill for its checksums of the same list, added up."""
        self.asks.write(json.dumps({"size": size, "mixed": mixed, "seed": seed}) + "\n")
        self.asks.flush()
        return int(self.answers.readline())

    def measure(self, size: int, mixed: bool, seed: int) -> Record:
        """Measure one block size; raise SystemExit if a byte or a checksum is wrong."""
        count = NBYTES // size
        there = np.random.default_rng(seed).permutation(count)
        here = np.random.default_rng(seed + 1).permutation(count)
        if not mixed:
            there.sort()
            here.sort()
        s, t = copy.table(there, count, "source"), copy.table(here, count, "target", unique=True)
        shape = (count, size // 8)
        foreign, target, expected = (
            part.view(torch.int64).view(shape) for part in (self.foreign, self.target, self.expected)
        )
        found: list[Any] = []

        def kernel(checksum: bool) -> Any:
            return copy.copy_blocks(self.peer, self.own, s, t, size, checksum=checksum)

        def whole(checksum: bool) -> None:
            a = copy.table(there, count, "source")
            b = copy.table(here, count, "target", unique=True)
            copy.copy_blocks(self.peer, self.own, a, b, size, checksum=checksum)

        paths = {
            "copy": (lambda: self.target.copy_(self.expected), timed),
            "kernel": (lambda: kernel(False), timed),
            "kernel+sum": (lambda: kernel(True), timed),
            "sum": (lambda: copy.sum_blocks(self.peer, s, size), timed),
            "torch": (lambda: target.index_copy_(0, t.numbers, foreign.index_select(0, s.numbers)), timed),
            "copy host": (lambda: self.target.copy_(self.expected), clocked),
            "kernel host": (lambda: whole(False), clocked),
            "kernel+sum host": (lambda: whole(True), clocked),
        }
        record = rounds(paths, NBYTES)
        wanted = self.prefill_sum(size, mixed, seed)
        for name in ("kernel", "kernel+sum", "torch"):
            self.target.fill_(0xA5)
            found.append(paths[name][0]())
            for low in range(0, count, max(1, count // 8)):
                part = slice(low, low + max(1, count // 8))
                if not torch.equal(target[t.numbers[part]], expected[s.numbers[part]]):
                    raise SystemExit(f"{name} at {size} bytes: wrong bytes arrived")
        if int(found[1].sum()) != wanted:
            raise SystemExit(f"{size} bytes: the checksum is {int(found[1].sum())}, prefill says {wanted}")
        return record

    def layouts(self) -> Record:
        """Copy the same KV between layouts, two checks each: bytes against torch's own permutation, and checksums."""
        both: Record = {}
        layout = KVLayout(TOKENS // 16, LAYERS, 16, HEADS, DIM, "float16")
        wide = KVLayout(TOKENS // 64, LAYERS, 64, HEADS, DIM, "float16")
        half = KVLayout(TOKENS // 16, LAYERS, 16, HEADS // 2, DIM, "float16")
        source = view.block_major(layout)
        order = np.random.default_rng(SEED).permutation(TOKENS // 16)
        # The KV in logical order: layer, kv, token, head, words of a head.
        kv = self.expected.view(torch.int64).view(TOKENS // 16, LAYERS, 2, 16, HEADS, DIM // 4)
        logical = kv[torch.from_numpy(order).cuda()].permute(1, 2, 0, 3, 4, 5).reshape(LAYERS, 2, TOKENS, HEADS, -1)
        cases = {
            "same layout, blocks of 16": (view.block_major(layout), 16),
            "blocks of 16 to 64 tokens": (view.block_major(wide), 64),
            "block-major to layer-major": (view.layer_major(layout), 16),
            "to layer-major, heads before tokens": (view.layer_major(layout, heads_first=True), 16),
            "to one of 2 ranks (4 of 8 heads)": (view.block_major(half).shard(0, 4), 16),
        }
        for name, (target, block) in cases.items():
            blocks = np.random.default_rng(SEED + 1).permutation(TOKENS // block)
            region = view.shared(source, target, (0, TOKENS))

            def go(group: int, target: Any = target, blocks: Any = blocks) -> Any:
                return copy.copy_kv(self.peer, source, order, self.own, target, blocks, (0, TOKENS), group=group)

            nbytes = int(np.prod(region.shape)) * target.head_bytes
            both[name] = rounds(
                {
                    "copy": (lambda n=nbytes: self.target[:n].copy_(self.expected[:n]), timed),
                    "kernel": (lambda go=go: go(0), timed),
                    "kernel+sum": (lambda go=go: go(64), timed),
                },
                nbytes,
            )
            self.target.fill_(0xA5)
            sums = go(64)
            if not torch.equal(sums, copy.sum_kv(self.peer, source, order, region, 64)):
                raise SystemExit(f"{name}: checksums of source and copy differ")
            if not torch.equal(sums, copy.sum_kv(self.own, target, blocks, region, 64)):
                raise SystemExit(f"{name}: checksums of source and target differ")
            starts = torch.from_numpy(view.offsets(target, blocks, region)).cuda() // 8
            words = self.target.view(torch.int64)
            for layer in range(LAYERS):
                got = words[starts[layer][..., None] + torch.arange(DIM // 4, device="cuda")]
                if not torch.equal(got, logical[layer][:, :, region.heads[0] : region.heads[1]]):
                    raise SystemExit(f"{name}: wrong bytes arrived in layer {layer}")
        return both


def nixl(environment: dict[str, str]) -> Record:
    """Measure NIXL READ in a pair of processes with this environment, GB/s by block size."""
    from benchmarks import gpu_fabrics as fabrics

    record: Record = {}
    with tempfile.TemporaryDirectory() as name:
        given = fabrics.clean({**fabrics.nixl_environment(), **environment})
        pair = [fabrics.Process(role, "gpu", given, Path(name)) for role in ("prefill", "decode")]
        try:
            there = pair[0].ask(do="describe")
            if "error" in there:
                return there
            pair[1].ask(do="connect", metadata=there["metadata"], address=there["address"])
            for size in NIXL_SIZES:
                pair[1].ask(do="spoil")
                answer = pair[1].ask(do="read", block=size)
                if "error" not in answer and answer["digest"] != there["digest"]:
                    answer = {"error": "wrong bytes arrived"}
                record[str(size)] = round(answer["gbs"], 2) if "gbs" in answer else answer["error"]
                if "error" in answer:
                    break
        finally:
            for process in pair:
                process.end()
    return record


def tune(decode: Decode) -> Record:
    """Measure sizes of a program."""
    found: Record = {}
    kept = copy.TILE
    for size in (8 << 10, 32 << 10, 256 << 10):
        count = NBYTES // size
        s, t = (copy.table(np.random.default_rng(n).permutation(count), count, "tuned") for n in (1, 2))
        for tile in (4096, 8192, 16384, 32768):

            def go(checksum: bool, tile: int = tile, s: Any = s, t: Any = t, size: int = size) -> Any:
                copy.TILE = tile
                return copy.copy_blocks(decode.peer, decode.own, s, t, size, checksum=checksum)

            paths = {
                "copy": (lambda: decode.target.copy_(decode.expected), timed),
                "kernel": (lambda go=go: go(False), timed),
                "kernel+sum": (lambda go=go: go(True), timed),
            }
            found[f"blocks of {size}, programs of {tile}"] = rounds(paths, NBYTES)
    copy.TILE = kept
    return found


def table(records: dict[str, Record]) -> None:
    """Print medians, spread and ratio."""
    for label, record in records.items():
        print(label)
        for name, found in record.items():
            spread = f"{found['low']:8.1f} to {found['high']:8.1f}"
            print(f"    {name:16} {found['gbs']:8.1f} GB/s  {spread}  {found['ratio']:.3f}")


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nixl", action="store_true", help="measure NIXL too")
    parser.add_argument("--tune", action="store_true", help="only sizes of a program")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        prefill()
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: run this on a GPU host, with torch built for CUDA")
    results: Record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes": NBYTES}
    words = [sys.executable, __file__, "--child"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        decode = Decode(child)
        if given.tune:
            results["tune"] = tune(decode)
            table(results["tune"])
        else:
            results["blocks"] = {
                f"{size} {'random' if mixed else 'contiguous'}": decode.measure(size, mixed, SEED + size)
                for size in SIZES
                for mixed in (True, False)
            }
            table(results["blocks"])
            results["layouts"] = decode.layouts()
            table(results["layouts"])
        decode.mapping.close()
        decode.asks.close()
    if not given.tune:
        from benchmarks import gpu_agents

        results["agents"] = gpu_agents.run()
    if given.nixl:
        for name, environment in (("nixl", {}), ("nixl zcopy", {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on"})):
            results[name] = nixl(environment)
            print(name, results[name])
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
