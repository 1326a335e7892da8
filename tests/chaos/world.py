"""A prefill agent and two decode agents as processes, a wire between them, and what must hold after every fault."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.chaos.wire import Wire
from tests.unit.transfer.transfer_pair import Agent

TIMES = {
    "heartbeat_s": 0.2, "resume_s": 1.0, "ticket_ttl_s": 2.0, "read_timeout_s": 2.0, "stall_timeout_s": 3.0,
    "recheck_every": 4,
}  # fmt: skip
# Until everything that a fault left must have been given back: the deadline, the silence, the resuming, and patience.
FREED_S = 25.0
HANG_S = 45.0


class Violation(Exception):
    """What must never happen has happened."""


class World:
    """The processes of one path. A process that a fault ended is started again by `mend`."""

    def __init__(self, path: str, backend: str, rng: random.Random) -> None:
        self.path, self.backend, self.rng = path, backend, rng
        self.ends: dict[str, Agent] = {}
        self.control: Wire | None = None
        self.stream: Wire | None = None
        self.requests: dict[str, set[str]] = {}
        self.mend()

    def mend(self) -> None:
        """Start what does not run."""
        for name in ("prefill-0", "decode-0", "decode-1"):
            end = self.ends.get(name)
            if end is not None and end.process.poll() is None:
                continue
            if end is not None:
                end.abandon()
            self.ends[name] = Agent(name.partition("-")[0], self.backend, name=name, path=self.path, **TIMES)
            self.requests[name] = set()
            if name == "prefill-0":
                self._wires()
                self.prefill.call("fill", self.rng.randrange(1 << 30))

    def _wires(self) -> None:
        for wire in (self.control, self.stream):
            if wire is not None:
                wire.close()
        self.control = Wire(self.prefill.port)
        self.stream = Wire(self.prefill.call("stream_port"))
        self.prefill.call("behind", self.control.port, self.stream.port)

    @property
    def prefill(self) -> Agent:
        return self.ends["prefill-0"]

    @property
    def decode(self) -> Agent:
        return self.ends["decode-0"]

    @property
    def thief(self) -> Agent:
        return self.ends["decode-1"]

    def alive(self, end: Agent) -> bool:
        return end.process.poll() is None

    def close(self) -> list[int]:
        """The exit codes."""
        codes = [end.close() for end in self.ends.values() if self.alive(end)]
        for end in self.ends.values():
            end.abandon()
        for wire in (self.control, self.stream):
            if wire is not None:
                wire.close()
        return codes

    def until(self, condition: Callable[[], Any], what: str) -> None:
        limit = time.monotonic() + FREED_S
        while not condition():
            if time.monotonic() > limit:
                raise Violation(f"not within {FREED_S:.0f} s: {what}")
            time.sleep(0.02)


class Transfer:
    """One prompt on its way, with what prefill had when it was exported."""

    def __init__(self, world: World, name: str) -> None:
        rng = world.rng
        self.world, self.name = world, name
        count = rng.choice((1, 3, 17, 60))
        self.source, self.target = rng.sample(range(256), count), rng.sample(range(256), count)
        self.token = rng.randrange(1000)
        steps = rng.randint(1, 6)
        pause = rng.choice((0.0, 0.005, 0.03))
        self.length = steps * pause + 0.02
        self.expected = world.prefill.call("digests", self.source)
        world.decode.call("scribble", self.target, 7.0)
        self.wire = world.prefill.call("begin_export", name, self.source, steps, pause, self.token)
        world.requests["prefill-0"].add(name)
        self.outcome: dict[str, Any] | None = None

    def begin(self) -> None:
        self.world.requests["decode-0"].add(self.name)
        self.world.decode.call("begin_fetch", self.wire, self.target)

    def end(self) -> dict[str, Any]:
        """What the fetch ended with. A fetch that does not end is a hang."""
        try:
            self.outcome = self.world.decode.call("end_fetch", self.name, timeout_s=HANG_S)
        except AssertionError as error:
            raise Violation(f"hang: {error}") from None
        return self.outcome

    def check(self) -> str:
        """Right bytes and the right token, or an error and blocks that nothing writes any more; says which."""
        outcome, decode = self.outcome, self.world.decode
        if outcome is None:
            return "not awaited"
        if "error" not in outcome:
            if decode.call("digests", self.target) != self.expected or outcome["first_token"] != self.token:
                raise Violation("a fetch succeeded with other bytes or another token than prefill exported")
            return "ok"
        decode.call("settled", self.name, timeout_s=HANG_S)
        decode.call("scribble", self.target, 9.0)
        return str(outcome["code"])

    def check_late(self) -> None:
        """After a failed fetch nothing may write its blocks, whatever comes back to life."""
        failed = self.outcome is not None and "error" in self.outcome
        if failed and not self.world.decode.call("untouched", self.target, 9.0):
            raise Violation("blocks of a failed fetch were written later")


def check_freed(world: World) -> None:
    """Every export is released once, nothing is in quarantine, and all of it is in the audit log."""
    if world.alive(world.prefill):
        mine = world.requests["prefill-0"]
        world.until(
            lambda: set(world.prefill.call("stats")["exports"].values()) == {0}, "prefill's exports are released"
        )
        released = [name for name, _ in world.prefill.call("releases")]
        if sorted(released) != sorted(mine):
            raise Violation(f"exported {sorted(mine)}, released {sorted(released)}")
        recorded = {entry["request"] for entry in world.prefill.call("records") if entry["event"] == "export"}
        if missing := mine - recorded:
            raise Violation(f"prefill's audit log lacks the exports {sorted(missing)}")
    for end in (world.decode, world.thief):
        if not world.alive(end):
            continue
        world.until(lambda end=end: end.call("stats")["quarantined_blocks"] == 0, f"{end.name}'s quarantine is empty")
        recorded = {entry["request"] for entry in end.call("records") if entry["event"] == "transfer"}
        if missing := world.requests[end.name] - recorded:
            raise Violation(f"{end.name}'s audit log lacks the transfers {sorted(missing)}")


def resume(end: Agent) -> None:
    end.kill(signal.SIGCONT)
