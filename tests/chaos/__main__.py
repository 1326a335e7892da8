"""Faults at random points of the protocol, between real agent processes, over every path.

After every point: a fetch that succeeded has prefill's bytes and token, one that failed says why and nobody writes its
blocks any more, every export is released once, nothing is in quarantine, and the audit logs of all that still run have
it all. Nothing may take longer than its deadline. The next transfer works.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from tests.chaos.faults import FAULTS, WEIGHTS
from tests.chaos.steady import steady
from tests.chaos.world import Transfer, Violation, World, check_freed

PATHS = ("shared", "cma", "stream", "auto", "ucx", "nixl")
# Points before the processes are started anew: the audit log in memory holds 256 records.
LIFE = 25


def one(world: World, name: str, kind: str) -> str:
    """One point. Returns what became of the transfer."""
    world.mend()
    transfer = Transfer(world, name)
    FAULTS[kind](world, transfer)
    decode_lives = world.alive(world.decode)
    result = transfer.check() if decode_lives else "killed"
    check_freed(world)
    if decode_lives:
        transfer.check_late()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same faults (0: a new one)")
    parser.add_argument("--path", choices=PATHS, nargs="+", default=PATHS)
    parser.add_argument("--fault", choices=sorted(FAULTS), nargs="+", default=sorted(FAULTS))
    parser.add_argument("--steady", type=float, metavar="MINUTES", help="no faults: steady traffic between many agents")
    parser.add_argument("--prefill", type=int, default=8, help="prefill agents of --steady")
    parser.add_argument("--decode", type=int, default=8, help="decode agents of --steady")
    options = parser.parse_args()
    if options.steady:
        path = "auto" if options.path == PATHS else options.path[0]
        backend = path if path in ("ucx", "nixl") else "ucx"
        path = "backend" if path == backend else path
        print(steady(options.prefill, options.decode, options.steady, path, backend, options.seed or 1))
        return 0
    seed = options.seed or random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    print(f"{options.points} points, --seed {seed}", flush=True)
    results: Counter[tuple[str, str]] = Counter()
    violations: list[str] = []
    began, done = time.monotonic(), 0
    weights = [WEIGHTS.get(fault, 3) for fault in options.fault]
    while done < options.points:
        path = options.path[(done // LIFE) % len(options.path)]
        own = path not in ("ucx", "nixl")
        world = World(path if own else "backend", "ucx" if own else path, rng)
        try:
            for _ in range(min(LIFE, options.points - done)):
                done += 1
                (kind,) = rng.choices(options.fault, weights)
                name = f"p{done}"
                try:
                    result = one(world, name, kind)
                except (Violation, RuntimeError, EOFError, ConnectionError) as error:
                    violations.append(f"point {done}, path {path}, {kind}: {type(error).__name__}: {error}")
                    print(violations[-1], flush=True)
                    break  # the world is not what it should be: the next one is new
                results[kind, result] += 1
        finally:
            try:
                world.close()
            except (AssertionError, RuntimeError, EOFError, ConnectionError) as error:
                violations.append(f"after point {done}, path {path}: the processes did not end: {error}")
                print(violations[-1], flush=True)
        seconds = time.monotonic() - began
        print(f"{done:5d} points, {seconds:6.0f} s, {len(violations)} violations", flush=True)
    width = max(len(kind) for kind in FAULTS)
    for kind in sorted({kind for kind, _ in results}):
        ends = ", ".join(f"{result} {count}" for (its, result), count in sorted(results.items()) if its == kind)
        print(f"  {kind:{width}}  {ends}")
    print(f"{done} points: {len(violations)} violations (wrong bytes or tokens, leaks, hangs, missing records)")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
