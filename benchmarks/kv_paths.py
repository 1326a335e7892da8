"""How fast KV moves between two processes of this machine: own paths, the field's, and the limit, all in one run.

Shape of Llama-3.1-8B in bfloat16: 128 KiB of KV a token; a 16-token block of one layer's keys is 32 KiB, of the whole
model 2 MiB, one of eight tensor parallel heads' share 4 KiB. Two fabrics, each with two processes of its own:

host  the limit is one thread's memcpy of as many bytes
tcp   loopback; the limit is one plain socket moving as many bytes in one run

Every method moves every row in every round, so that a slower minute slows all; a ratio is taken within one round, and
the median over the rounds is printed with the smallest and the largest, and behind "best" the fastest round of the
limit over the fastest of the method: on a busy machine the better guess of what a quiet one gives. Before it is timed,
each method's bytes are compared word for word. NIXL and UCX sleep while idle here (the wheels' default burns a core on
each side).

    python -m benchmarks.kv_paths --quick --json kv_paths.json --html kv_paths.html
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv_methods import DecodeEnd, PrefillEnd, Row, wrong_bytes
from benchmarks.plot import chart, page
from pdstack.transfer.paths.copying import THREADS
from pdstack.transfer.plan import blocks

TOKEN_BYTES = 128 << 10
KIB = 1 << 10
# (order of the blocks, bytes a block)
CASES = (
    ("contiguous", 32 * KIB),
    ("runs of 8", 32 * KIB),
    ("random", 4 * KIB),
    ("random", 32 * KIB),
    ("random", 64 * KIB),
    ("random", 128 * KIB),
    ("random", 2048 * KIB),
)
# A method so many times slower than the limit moves once, and not at all in the longer contexts: nobody waits for that.
SLOW = 25
LIMIT = {"host": "memcpy", "tcp": "socket"}
ENVIRONMENT = {
    "host": {"UCX_TLS": "tcp,cma,self", "UCX_NET_DEVICES": "lo"},
    "tcp": {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"},
}
# What must hold: fabric, order, bytes a block, ratio of the best own path without checksum to the limit.
BARS = (
    ("host", "contiguous", 32 * KIB, 0.95),
    ("host", "random", 128 * KIB, 0.95),
    ("host", "random", 32 * KIB, 0.85),
    ("host", "random", 4 * KIB, 0.50),
    ("tcp", "random", 128 * KIB, 1.4),
    ("tcp", "random", 2048 * KIB, 1.4),
    ("tcp", "random", 32 * KIB, 1.0),
    ("tcp", "random", 4 * KIB, 0.9),
)
OWN = ("shared", "cma", "stream")
RIVALS = ("nixl prepped", "mooncake")
Result = dict[str, Any]


def rows(tokens: int) -> Iterator[tuple[str, Row]]:
    """Every case of a context, in pools twice its size; source and target order are drawn apart."""
    rng = np.random.default_rng(tokens)
    for order, size in CASES:
        count = tokens * TOKEN_BYTES // size
        if order == "contiguous":
            source = target = np.arange(count)
            target = target + count // 2
        elif order == "random":
            source, target = rng.permutation(2 * count)[:count], rng.permutation(2 * count)[:count]
        else:
            source, target = (
                (rng.permutation(count // 4)[: count // 8, None] * 8 + np.arange(8)).reshape(-1) for _ in range(2)
            )
        yield order, Row(source, target, size, blocks(size, source, target))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Priority:
    """While it is entered, all threads of these processes go before all other work of the machine, in real time.

    For a machine that others use meanwhile. A move is short, and as much time is left to the others after it.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids

    def _schedule(self, policy: int, priority: int) -> None:
        for pid in self._pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(int(task.name), policy, os.sched_param(priority))

    def __enter__(self) -> None:
        self._schedule(os.SCHED_RR, 1)
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._schedule(os.SCHED_OTHER, 0)
        time.sleep(time.perf_counter() - self._began)  # as long as others were kept from running


def measure(
    end: DecodeEnd,
    limit: str,
    tokens: int,
    rounds: int,
    priority: contextlib.AbstractContextManager[None],
    slow: set[tuple[str, int, str]],
) -> list[Result]:
    """All methods over all rows of one context. What was slow in a shorter one is left out, and added to `slow`."""
    results = []
    for order, row in rows(tokens):
        moves, warm = {}, {}
        for name, method in end.methods.items():
            if (order, row.size, name) in slow:
                continue
            moves[name] = method(row)
            end.pool[:] = 0
            began = time.perf_counter()
            moves[name]()
            warm[name] = time.perf_counter() - began
            if name not in (limit, "2 sockets") and (wrong := wrong_bytes(row, end.pool)):
                raise SystemExit(
                    f"{name} moved {wrong} of {len(row.source)} blocks wrongly ({order}, {row.size} bytes)"
                )
        names = [name for name in moves if warm[name] <= SLOW * warm[limit]]
        slow |= {(order, row.size, name) for name in moves if name not in names}
        seconds = {name: [] if name in names else [warm[name]] for name in moves}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with priority:
                    began = time.perf_counter()
                    moves[name]()
                    seconds[name].append(time.perf_counter() - began)
        found = {}
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds[limit], times, strict=False)]
            best = min(seconds[limit]) / min(times)
            found[name] = {"ratio": {**spread(ratios), "best": best}, "ms": spread([value * 1e3 for value in times])}
        results.append(
            {"tokens": tokens, "order": order, "block_bytes": row.size, "extents": len(row.plan)}
            | {"bytes": row.plan.total, "limit": limit, "methods": found}
        )
        print(_line(results[-1]), flush=True)
    return results


def _line(result: Result) -> str:
    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["ratio"]["median"])
    cells = []
    for name, value in methods:
        ratio = value["ratio"]
        if name != result["limit"]:
            cells.append(
                f"{name} {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}, best {ratio['best']:.2f})"
            )
    limit = result["methods"][result["limit"]]["ms"]["median"]
    return (
        f"{result['tokens']:>5} tokens  {result['order']:<10} {result['block_bytes'] // KIB:>4} KiB x"
        f" {result['extents']:<6} {result['limit']} {limit:.1f} ms | {'  '.join(cells)}"
    )


def _best(result: Result, names: Sequence[str], figure: str) -> tuple[str, float]:
    chosen = {
        name: float(value["ratio"][figure])
        for name, value in result["methods"].items()
        if name.startswith(tuple(names)) and "xxh3" not in name
    }
    return max(chosen.items(), key=lambda item: item[1]) if chosen else ("none", 0.0)


def verdicts(results: Sequence[Result]) -> list[str]:
    """Each bar beside what was measured, medians first, and own beside raw, row by row."""
    lines = []
    for result in results:
        fabric = "tcp" if result["limit"] == "socket" else "host"
        where = f"{fabric:<4} {result['tokens']:>5} tokens {result['order']:<10} {result['block_bytes'] // KIB:>4} KiB"
        (name, own), (_, own_best) = (_best(result, OWN, figure) for figure in ("median", "best"))
        (rival, theirs), (_, their_best) = (_best(result, RIVALS, figure) for figure in ("median", "best"))
        for wanted in [bar for *key, bar in BARS if key == [fabric, result["order"], result["block_bytes"]]]:
            held = _held(own >= wanted, own_best >= wanted)
            lines.append(f"{held} {where}: {name} {own:.2f} (best {own_best:.2f}), wanted {wanted} of the limit")
        if not theirs:
            continue
        small = {32 * KIB: 1.5, 4 * KIB: 3.0} if (fabric, result["order"]) == ("host", "random") else {}
        wanted = small.get(result["block_bytes"], 0.98)
        ratio, best = own / theirs, own_best / their_best
        held = _held(ratio >= wanted, best >= wanted)
        lines.append(f"{held} {where}: {name} is {ratio:.2f} x {rival} (best {best:.2f}), wanted {wanted}")
    return lines


def _held(median: bool, best: bool) -> str:
    return "held  " if median else "(best)" if best else "MISSED"


def decode(address: str, fabric: str, contexts: Sequence[int], rounds: int, threads: int, first: bool) -> None:
    """The measuring process: starts prefill, measures, sends its results to the one that asked."""
    with Client(address, authkey=os.environ["PAIR_AUTH"].encode()) as report:
        nbytes = 2 * max(contexts) * TOKEN_BYTES
        auth = secrets.token_hex(16)
        with Listener(authkey=auth.encode()) as listener:
            command = [
                sys.executable,
                "-m",
                "benchmarks.kv_paths",
                "--prefill",
                str(listener.address),
                fabric,
                str(nbytes),
            ]
            prefill = subprocess.Popen(command, env=os.environ | {"PAIR_AUTH": auth}, stdout=sys.stderr)
            pipe = listener.accept()
        try:
            metadata = pipe.recv()
            end = DecodeEnd(nbytes, fabric, metadata, threads)
            priority = Priority([os.getpid(), prefill.pid]) if first else contextlib.nullcontext()
            found, slow = [], set[tuple[str, int, str]]()
            for tokens in sorted(contexts):
                few = rounds if tokens < 8192 else min(rounds, 5)
                found += measure(end, LIMIT[fabric], tokens, few, priority, slow)
            report.send({"results": found, "notes": end.notes, "pages": metadata.get("pages")})
            report.recv()
        finally:
            prefill.kill()
            prefill.wait()
        sys.stdout.flush()
        os._exit(0)  # the wheels' own threads and libraries do not all end well (kv-transfer: exit crash)


def prefill(address: str, fabric: str, nbytes: int) -> None:
    """The process whose memory is read."""
    with Client(address, authkey=os.environ["PAIR_AUTH"].encode()) as pipe:
        end = PrefillEnd(nbytes, fabric)
        pipe.send(end.metadata)
        pipe.poll(None)


def run(fabric: str, contexts: Sequence[int], rounds: int, threads: int, first: bool) -> Result:
    """One fabric in processes of its own: UCX reads its environment once."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("UCX_", "NIXL_", "MC_"))}
    auth = secrets.token_hex(16)
    with Listener(authkey=auth.encode()) as listener:
        command = [sys.executable, "-m", "benchmarks.kv_paths", "--decode", str(listener.address), fabric]
        command += [str(rounds), str(threads), str(int(first)), *map(str, contexts)]
        quiet = {"PAIR_AUTH": auth, "GLOG_minloglevel": "2", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=clean | ENVIRONMENT[fabric] | quiet)
        with listener.accept() as pipe:
            try:
                found: Result = pipe.recv()
            except EOFError:
                raise SystemExit(f"the {fabric} measurement ended early with exit code {process.wait()}") from None
            pipe.send(None)
    process.wait()
    return found


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--prefill"]:
        return prefill(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    if sys.argv[1:2] == ["--decode"]:
        address, fabric, rounds, threads, first, *contexts = sys.argv[2:]
        return decode(address, fabric, [int(n) for n in contexts], int(rounds), int(threads), first == "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens only, 5 rounds")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="lengths of context")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=THREADS, help="copying threads of the own paths")
    parser.add_argument("--fabric", choices=tuple(LIMIT), action="append")
    parser.add_argument(
        "--first", action="store_true", help="go before other work while a move is timed (root; for a busy machine)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path, help="the same as one page with a picture")
    options = parser.parse_args()
    contexts, rounds = ([512], 5) if options.quick else (options.tokens, options.rounds)
    results, notes, report = [], [], {}
    for fabric in options.fabric or LIMIT:
        print(
            f"--- {fabric}: ratio to {LIMIT[fabric]} of the same bytes, median (min-max) of {rounds} rounds", flush=True
        )
        found = run(fabric, contexts, rounds, options.threads, options.first)
        results += found["results"]
        notes += found["notes"]
        if found["pages"]:
            notes.append(
                f"shared pool: {found['pages']['huge'] >> 20} of {found['pages']['nbytes'] >> 20} MiB in huge pages"
            )
    load = os.getloadavg()[0]
    notes.append(f"{os.cpu_count()} cores, load {load:.1f} at the end, {options.threads} copying threads")
    if options.first:
        notes.append("moves were timed in real-time priority")
    text = "\n".join([*verdicts(results), *(f"note: {note}" for note in notes)])
    print(text)
    report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "results": results, "notes": notes}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.html:
        lines = "\n".join([*map(_line, results), text])
        options.html.write_text(page(f"KV paths, {report['date']}", lines, list(charts(results))))
    return None


def charts(results: Sequence[Result]) -> Iterator[str]:
    """One picture a fabric and context: random blocks, all methods."""
    for limit, tokens in sorted({(result["limit"], result["tokens"]) for result in results}):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if (result["limit"], result["tokens"], result["order"]) == (limit, tokens, "random"):
                for name, value in result["methods"].items():
                    lines.setdefault(name, []).append((result["block_bytes"], value["ratio"]["median"]))
        yield chart(f"{tokens} tokens, random blocks", f"ratio to {limit} of the same bytes", lines)


if __name__ == "__main__":
    main()
