"""Steady traffic between many agents: every fetch right, nothing held at the end, and no process that grows."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

from tests.chaos.world import Violation
from tests.unit.transfer.transfer_pair import Agent

# What may come and go: caches, one more connection, an arena of the allocator.
_RSS_KIB, _FILES = 24 << 10, 12
_SETTLED = 0.3  # of the time: by then every pair has met, and what is allocated once is allocated


class _Prefill:
    """One prefill process; many threads ask it, one at a time."""

    def __init__(self, number: int, path: str, backend: str) -> None:
        self.end = Agent("prefill", backend, name=f"prefill-{number}", path=path)
        self.end.call("fill", number + 1)
        self.lock = threading.Lock()
        self.digests = self.end.call("digests", list(range(256)))
        self.exported = 0

    def export(self, name: str, blocks: list[int]) -> dict[str, Any]:
        with self.lock:
            self.exported += 1
            wire: dict[str, Any] = self.end.call("export", name, blocks, 1)
            return wire


def _use(end: Agent) -> tuple[int, int, int]:
    """(resident KiB, open files, threads) of a process."""
    proc = Path("/proc") / str(end.process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), len(list((proc / "fd").iterdir())), int(status["Threads"])


def steady(prefill: int, decode: int, minutes: float, path: str, backend: str, seed: int) -> str:
    """Run it. Returns a line of figures; raises :class:`Violation`."""
    sources = [_Prefill(number, path, backend) for number in range(prefill)]
    targets = [Agent("decode", backend, name=f"decode-{number}", path=path) for number in range(decode)]
    for target in targets:
        target.call("fill", 0)
    until, done, problems = time.monotonic() + 60 * minutes, [0] * decode, list[str]()
    moved = [0] * decode

    def drive(number: int) -> None:
        rng, end = random.Random(seed * 1000 + number), targets[number]
        while time.monotonic() < until and not problems:
            source = rng.choice(sources)
            count = rng.choice((1, 4, 16, 64))
            blocks, local = rng.sample(range(256), count), rng.sample(range(256), count)
            name = f"d{number}-{done[number]}"
            report = end.call("fetch", source.export(name, blocks), local)
            if "error" in report:
                problems.append(f"decode-{number} from {source.end.name}: {report}")
            elif done[number] % 16 == 0 and end.call("digests", local) != [source.digests[block] for block in blocks]:
                problems.append(f"decode-{number} from {source.end.name}: wrong bytes")
            done[number] += 1
            moved[number] += report.get("bytes", 0)

    began = time.monotonic()
    threads = [threading.Thread(target=drive, args=(number,)) for number in range(decode)]
    for thread in threads:
        thread.start()
    time.sleep(60 * minutes * _SETTLED)  # what a process needs once is there by then
    ends = [*(source.end for source in sources), *targets]
    before = [_use(end) for end in ends]
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    if problems:
        raise Violation(problems[0])
    worst = [max(after[at] - was[at] for after, was in zip(map(_use, ends), before, strict=True)) for at in range(3)]
    limit = time.monotonic() + 10
    for source in sources:
        while set(source.end.call("stats")["exports"].values()) != {0}:
            if time.monotonic() > limit:
                raise Violation(f"{source.end.name} still holds exports")
        if len(released := source.end.call("releases")) != source.exported or {why for _, why in released} != {"read"}:
            raise Violation(f"{source.end.name} exported {source.exported} and released {len(released)}")
    if any(target.call("stats")["quarantined_blocks"] for target in targets):
        raise Violation("blocks are in quarantine after traffic without a fault")
    # The list of releases that the harness itself keeps is about 200 bytes an entry.
    if worst[0] > _RSS_KIB + max(source.exported for source in sources) * 200 // 1024 or worst[1] > _FILES:
        raise Violation(f"a process grew by {worst[0]} KiB, {worst[1]} files, {worst[2]} threads")
    codes = {end.close() for end in ends}
    if codes != {0}:
        raise Violation(f"exit codes {sorted(codes)}")
    return (
        f"{prefill} x {decode} agents, path {path}, {seconds:.0f} s: {sum(done)} transfers, {sum(moved) / 1e9:.1f} GB, "
        f"all right; most growth of a process {worst[0]} KiB, {worst[1]} files, {worst[2]} threads"
    )
