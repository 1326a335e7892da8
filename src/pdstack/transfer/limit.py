"""The limit beside which a transfer is measured: one thread's memcpy of as many bytes, on this machine, now.

``python -m pdstack.transfer.limit --bytes N`` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import sys
import time
from typing import NamedTuple

import numpy as np


class Memcpy(NamedTuple):
    """A measured memcpy: `gbps` is 10^9 bytes per second, the median of `rounds` copies of `nbytes`."""

    nbytes: int
    rounds: int
    gbps: float


def measure(nbytes: int, rounds: int = 9) -> Memcpy:
    """Copy `nbytes` from one buffer to another `rounds` times; both are touched before, so no page faults are timed."""
    if nbytes < 1 or rounds < 1:
        raise ValueError(f"memcpy of {nbytes} bytes {rounds} times, wanted at least 1 of each")
    buffers = [np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8) for _ in range(2)]
    for value, buffer in enumerate(buffers):
        buffer.fill(value)
    source, target = (buffer.ctypes.data for buffer in buffers)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        ctypes.memmove(target, source, nbytes)
        times.append(time.perf_counter() - start)
    return Memcpy(nbytes, rounds, nbytes / sorted(times)[rounds // 2] / 1e9)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m pdstack.transfer.limit", description=__doc__)
    parser.add_argument("--bytes", type=int, default=64 << 20, help="bytes per copy (default 64 MiB)")
    parser.add_argument("--rounds", type=int, default=9, help="copies; the median counts (default 9)")
    options = parser.parse_args(arguments)
    if options.bytes < 1 or options.rounds < 1:
        parser.error("--bytes and --rounds must be at least 1")
    result = measure(options.bytes, options.rounds)
    sys.stdout.write(
        json.dumps({"bytes": result.nbytes, "rounds": result.rounds, "memcpy_gbps": round(result.gbps, 3)}) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
