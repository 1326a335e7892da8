"""What agents cost while they idle, and how soon prefill hears that decode has verified the last byte.

For each backend and path: a prefill and a decode agent, each in a process of its own, connected by a transfer.

idle    processor time of each process over --seconds in which nothing is transferred, from /proc/PID/stat, as a share
        of one core. Heartbeats, metrics and the library's own threads are in it; bar: 0.02.
notice  from the moment decode's last block is verified to prefill's `on_release`, both by CLOCK_MONOTONIC, which is one
        clock for all processes of a host; bar: 95 % within 1 ms while each end has a busy thread. The thread computes
        as an engine does, in libraries that let the interpreter run meanwhile (numpy); "python" is the worst that
        could be, a thread that never lets go of the interpreter by itself.

Two busy threads, two event loops and the reading thread are more than two cores can run at once, and a thread that
wakes up may wait there for the next tick of the scheduler. --first gives the event loops real-time priority (root):
what a machine with a core for each of them would show.

    python -m benchmarks.kv_idle --json kv_idle.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from pdstack.transfer import ClusterKey, KVLayout, Role, Ticket, TransferAgent, TransferConfig, TransferMetrics
from pdstack.transfer import allocate_pool as allocate
from pdstack.transfer.backends import BACKENDS
from pdstack.transfer.incoming import Incoming
from pdstack.transfer.paths.base import AUTO, BACKEND, PATHS

# 64 KiB a block; a transfer is 32 blocks, 512 tokens.
LAYOUT = KVLayout(num_blocks=256, num_layers=4, block_size=16, num_kv_heads=4, head_dim=32, model_id="idle")
BLOCKS = 32
IDLE_BAR, NOTICE_BAR_MS = 0.02, 1.0
BUSY = ("nothing", "numpy", "python")
# Over TCP the backends' READ is answered by prefill's process; on one host the kernel copies.
ENVIRONMENT = {"UCX_TLS": "tcp,cma,self", "UCX_NET_DEVICES": "lo", "OPENBLAS_NUM_THREADS": "1"}
_TICKS = os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    """Processor time of a process so far, all threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


# --- an end


class Busy:
    """A thread that works until the next one is asked for."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, what: str) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._stop = threading.Event()
        self._thread = None
        if what != "nothing":
            self._thread = threading.Thread(target=getattr(self, f"_{what}"), args=(self._stop,), daemon=True)
            self._thread.start()

    @staticmethod
    def _numpy(stop: threading.Event) -> None:
        matrix = np.ones((512, 512), np.float32)
        while not stop.is_set():
            matrix @ matrix

    @staticmethod
    def _python(stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            for _ in range(10_000):
                number += 1


class End:
    """One agent, asked over a pipe: the name of a method and its arguments."""

    def __init__(self, role: Role, backend: str, path: str, first: bool) -> None:
        self._role, self._busy, self._first = role, Busy(), first
        self._config = TransferConfig(
            cluster_key=ClusterKey(b"benchmark only " * 3),
            backend=backend,
            path=path,
            listen_host="127.0.0.1",
            listen_port=0,
        )
        self._pool: Any = None
        self._agent: Any = None
        self._released: dict[str, int] = {}
        self._wanted, self._all = 0, asyncio.Event()
        self._verified = 0
        right = Incoming.right

        def timed(incoming: Incoming, *arguments: Any) -> list[int]:
            found = right(incoming, *arguments)
            if threading.current_thread() is not threading.main_thread():
                self._verified = time.monotonic_ns()
            return found

        # The moment itself is inside of a fetch, in the thread that reads, where only its own code sees it.
        Incoming.right = timed  # type: ignore[method-assign]

    async def open(self) -> None:
        if self._first:
            # Of this thread alone: those that it starts are as any other.
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        self._pool = allocate(LAYOUT, self._config.path if self._role is Role.PREFILL else BACKEND)
        self._pool[...] = 1 if self._role is Role.PREFILL else 0
        self._agent = await TransferAgent.create(
            self._role,
            name=f"{self._role.value}-0",
            audience="bench",
            layout=LAYOUT,
            pool=self._pool,
            config=self._config,
            metrics=TransferMetrics(CollectorRegistry()),
        )

    async def busy(self, what: str) -> None:
        self._busy.set(what)

    def _on_release(self, request: str, _reason: object) -> None:
        self._released[request] = time.monotonic_ns()
        if len(self._released) == self._wanted:
            self._all.set()

    async def export(self, requests: Sequence[str]) -> list[dict[str, Any]]:
        self._released.clear()
        self._wanted, self._all = len(requests), asyncio.Event()
        blocks = range(BLOCKS)
        return [self._agent.export(name, blocks, BLOCKS * 16, 7, self._on_release).to_wire() for name in requests]

    async def fetch(self, wires: Sequence[dict[str, Any]]) -> dict[str, Any]:
        verified = {}
        for wire in wires:
            ticket = Ticket.from_wire(wire)
            report = await self._agent.fetch(ticket, range(BLOCKS))
            verified[ticket.request_id] = self._verified
        return {"verified": verified, "transport": report.transport}

    async def released(self, requests: Sequence[str]) -> dict[str, int]:
        async with asyncio.timeout(60):
            await self._all.wait()
        return {name: self._released[name] for name in requests}

    async def close(self) -> None:
        self._busy.set("nothing")
        await self._agent.close()


def serve(role: str, backend: str, path: str, first: str, address: str) -> None:
    """The process of one end."""

    async def converse(pipe: Connection) -> None:
        end = End(Role(role), backend, path, first == "1")
        loop = asyncio.get_running_loop()
        while True:
            try:
                name, arguments = await loop.run_in_executor(None, pipe.recv)
            except EOFError:
                return
            pipe.send(await getattr(end, name)(*arguments))

    with Client(address, authkey=os.environ["PAIR_AUTH"].encode()) as pipe:
        asyncio.run(converse(pipe))
    os._exit(0)  # the wheels' own threads do not all end well


# --- the one who measures


class Process:
    def __init__(self, role: Role, backend: str, path: str, first: bool) -> None:
        auth = secrets.token_hex(16)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("UCX_", "NIXL_"))}
        with Listener(authkey=auth.encode()) as listener:
            command = [sys.executable, "-m", "benchmarks.kv_idle", "--end", role.value, backend, path, str(int(first))]
            environment = clean | ENVIRONMENT | {"PAIR_AUTH": auth}
            self._process = subprocess.Popen([*command, str(listener.address)], env=environment)
            self._pipe = listener.accept()
        self.pid = self._process.pid
        self.call("open")

    def call(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        if not self._pipe.poll(120):
            raise SystemExit(f"process {self.pid} did not answer {name!r}")
        return self._pipe.recv()

    def close(self) -> None:
        self.call("close")
        self._pipe.close()
        self._process.wait(20)


class Pair:
    """Two ends that have moved something already: all connections are there."""

    def __init__(self, backend: str, path: str, first: bool) -> None:
        self.prefill, self.decode = (Process(role, backend, path, first) for role in (Role.PREFILL, Role.DECODE))
        self.transport = self._move(3)["transport"]

    def _move(self, count: int) -> dict[str, Any]:
        names = [secrets.token_hex(4) for _ in range(count)]
        wires = self.prefill.call("export", names)
        found = self.decode.call("fetch", wires)
        released = self.prefill.call("released", names)
        times = [(released[name] - found["verified"][name]) / 1e6 for name in names]
        return {"ms": times, "transport": found["transport"]}

    def processor_s(self) -> tuple[float, float]:
        return processor_s(self.prefill.pid), processor_s(self.decode.pid)

    def notice(self, busy: str, count: int) -> dict[str, float]:
        for end in (self.prefill, self.decode):
            end.call("busy", busy)
        times = sorted(value for _ in range(count // 50) for value in self._move(50)["ms"])
        for end in (self.prefill, self.decode):
            end.call("busy", "nothing")
        return {
            "p50_ms": statistics.median(times),
            "p95_ms": times[int(0.95 * len(times))],
            "max_ms": times[-1],
            "count": len(times),
        }

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()


def measure(backend: str, path: str, seconds: float, notices: int, first: bool) -> dict[str, Any]:
    """One pair, alone: idle first, then the notices."""
    pair = Pair(backend, path, first)
    time.sleep(2)  # what connecting set off has ended
    before, began = pair.processor_s(), time.monotonic()
    time.sleep(seconds)  # the length of the measurement
    passed = time.monotonic() - began
    cores = [(after - was) / passed for after, was in zip(pair.processor_s(), before, strict=True)]
    found: dict[str, Any] = {"backend": backend, "path": path, "transport": pair.transport}
    found |= {"seconds": passed, "prefill_cores": cores[0], "decode_cores": cores[1]}
    found["notice"] = {busy: pair.notice(busy, notices) for busy in BUSY}
    pair.close()
    print(line(found), flush=True)
    return found


def line(found: dict[str, Any]) -> str:
    notices = "  ".join(
        f"{busy} {each['p50_ms']:.2f} / {each['p95_ms']:.2f} / {each['max_ms']:.1f}"
        for busy, each in found["notice"].items()
    )
    return (
        f"{found['backend']:<4} {found['path']:<7} over {found['transport']:<8} idle cores: prefill"
        f" {found['prefill_cores']:.4f} decode {found['decode_cores']:.4f} | notice ms, p50 / p95 / max: {notices}"
    )


def verdicts(results: Sequence[dict[str, Any]]) -> list[str]:
    idle = max((max(one["prefill_cores"], one["decode_cores"]), one["backend"], one["path"]) for one in results)
    late = max((one["notice"]["numpy"]["p95_ms"], one["backend"], one["path"]) for one in results)
    held = ["held  " if ok else "MISSED" for ok in (idle[0] < IDLE_BAR, late[0] < NOTICE_BAR_MS)]
    return [
        f"{held[0]} idle agent: at most {idle[0]:.4f} core ({idle[1]}, {idle[2]}), wanted less than {IDLE_BAR}",
        f"{held[1]} notice, both ends busy: p95 at most {late[0]:.2f} ms ({late[1]}, {late[2]}), "
        f"wanted less than {NOTICE_BAR_MS:g} ms",
    ]


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--end"]:
        return serve(*sys.argv[2:7])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each pair idles")
    parser.add_argument("--notices", type=int, default=500, help="transfers a pair and kind of busy thread")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--path", choices=(BACKEND, *PATHS, AUTO), action="append")
    parser.add_argument("--first", action="store_true", help="event loops in real-time priority (root)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pairs = [
        (backend, path)
        for backend in options.backend or BACKENDS
        for path in options.path or (BACKEND, "shared", "cma", "stream", AUTO)
    ]
    results = [measure(*pair, options.seconds, options.notices, options.first) for pair in pairs]
    for verdict in verdicts(results):
        print(verdict)
    print(f"note: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
