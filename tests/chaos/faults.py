"""The faults: each gets a transfer under way and does its harm at a random moment."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.chaos.world import Transfer, Violation, World, resume

Fault = Callable[[World, Transfer], None]


def moment(world: World, transfer: Transfer) -> None:
    """A random moment of the transfer, from before its first frame to after its last."""
    time.sleep(world.rng.uniform(0.0, 1.2) * transfer.length)


def nothing(world: World, transfer: Transfer) -> None:
    """No fault: a transfer must succeed, and fast."""
    transfer.begin()
    if "error" in (outcome := transfer.end()):
        raise Violation(f"a transfer failed without a fault: {outcome}")


def kill_prefill(world: World, transfer: Transfer) -> None:
    transfer.begin()
    moment(world, transfer)
    world.prefill.kill()
    world.prefill.process.wait(10)
    transfer.end()


def kill_decode(world: World, transfer: Transfer) -> None:
    transfer.begin()
    moment(world, transfer)
    world.decode.kill()
    world.decode.process.wait(10)


def _stop(world: World, transfer: Transfer, which: str) -> None:
    end = world.ends[which]
    transfer.begin()
    moment(world, transfer)
    end.kill(signal.SIGSTOP)
    again = threading.Timer(world.rng.choice((0.05, 0.5, 3.5)), resume, [end])
    again.start()
    transfer.end()
    again.join()


def stop_prefill(world: World, transfer: Transfer) -> None:
    _stop(world, transfer, "prefill-0")


def stop_decode(world: World, transfer: Transfer) -> None:
    _stop(world, transfer, "decode-0")


def partition(world: World, transfer: Transfer) -> None:
    assert world.control is not None
    assert world.stream is not None
    transfer.begin()
    moment(world, transfer)
    length = world.rng.choice((0.05, 0.5, 3.5))
    wires = [threading.Thread(target=wire.freeze, args=(length,)) for wire in (world.control, world.stream)]
    for wire in wires:
        wire.start()
    transfer.end()
    for wire in wires:
        wire.join()


def cut(world: World, transfer: Transfer) -> None:
    assert world.control is not None
    assert world.stream is not None
    transfer.begin()
    moment(world, transfer)
    for wire in world.rng.choice(([world.control], [world.stream], [world.control, world.stream])):
        wire.cut()
    transfer.end()


def forged(world: World, transfer: Transfer) -> None:
    """A ticket of which one field is another must open nothing, and the true one still works."""
    field = world.rng.choice(sorted(set(transfer.wire) - {"mac"}))
    value = transfer.wire[field]
    other: Any = f"{value}x" if isinstance(value, str) else [*value[1:], 5] if isinstance(value, list) else value + 1
    if other == value:
        other = [*value[1:], 6]
    outcome = world.thief.call("fetch", {**transfer.wire, field: other}, transfer.target)
    if outcome.get("code") not in ("forged", "malformed", "version"):
        raise Violation(f"a ticket with another {field} was not refused as forged: {outcome}")
    if outcome["code"] == "forged":
        _on_record(world, "decode-1", "forged")
    nothing(world, transfer)


def _on_record(world: World, name: str, verdict: str) -> None:
    if not any(entry.get("verdict") == verdict for entry in world.ends[name].call("records")[-20:]):
        raise Violation(f"{name}'s audit log does not show the verdict {verdict!r}")


def replayed(world: World, transfer: Transfer) -> None:
    """A ticket that was used, or is being used by another decode worker."""
    transfer.begin()
    if world.rng.random() < 0.5:
        world.until(lambda: world.prefill.call("stats")["exports"]["granted"] or _over(world, transfer), "the grant")
        outcome = world.thief.call("fetch", transfer.wire, transfer.target)
        transfer.end()
    else:
        transfer.end()
        outcome = world.decode.call("fetch", transfer.wire, transfer.target)
    if outcome.get("code") != "replayed":
        raise Violation(f"a ticket was good twice: {outcome}")
    _on_record(world, "prefill-0", "replayed")


def _over(world: World, transfer: Transfer) -> bool:
    return any(name == transfer.name for name, _ in world.prefill.call("releases"))


def flip_memory(world: World, transfer: Transfer) -> None:
    """A bit of prefill's memory turns after the block became final: decode must not take it."""
    transfer.begin()
    moment(world, transfer)
    world.prefill.call("turn_final", transfer.name)
    outcome = transfer.end()
    if "error" in outcome and outcome["code"] != "checksum":
        raise Violation(f"a turned bit gave another error than a wrong checksum: {outcome}")


def flip_wire(world: World, transfer: Transfer) -> None:
    """A bit turns between the hosts, in a control frame or in the KV bytes of path stream."""
    wire = world.rng.choice((world.control, world.stream))
    assert wire is not None
    wire.flip(world.rng.choice((0, 3, 40, 300, 5000, 100_000)))
    transfer.begin()
    transfer.end()
    wire.flip(-1)


def garbage(world: World, transfer: Transfer) -> None:
    """Strangers that send anything to every port."""
    assert world.control is not None
    assert world.stream is not None
    ports = [port for port in (world.control.there, world.stream.there) if port]
    transfer.begin()
    for _ in range(3):
        with suppress(OSError), socket.create_connection(("127.0.0.1", world.rng.choice(ports)), 5) as stranger:
            stranger.sendall(world.rng.randbytes(world.rng.choice((1, 4, 64, 5000))))
    if "error" in (outcome := transfer.end()):
        raise Violation(f"strangers made a transfer fail: {outcome}")


def cancelled(world: World, transfer: Transfer) -> None:
    transfer.begin()
    moment(world, transfer)
    if world.decode.call("cancel_fetch", transfer.name):
        _on_record(world, "decode-0", "cancelled")


def failed(world: World, transfer: Transfer) -> None:
    """Prefill cannot compute the prompt to its end."""
    transfer.begin()
    moment(world, transfer)
    world.prefill.call("fail", transfer.name)
    outcome = transfer.end()
    if "error" in outcome and outcome["code"] != "prefill_failed":
        raise Violation(f"a prompt that failed gave another error: {outcome}")


def unread(world: World, transfer: Transfer) -> None:
    """Nobody comes for the KV."""


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_prefill, kill_decode, stop_prefill, stop_decode, partition, cut, forged, replayed, flip_memory, flip_wire,
        garbage, cancelled, failed, unread, nothing,
    )
}  # fmt: skip
# Those that end or freeze a process take a second or more each.
WEIGHTS = {"kill_prefill": 2, "kill_decode": 2, "stop_prefill": 2, "stop_decode": 2, "partition": 2, "nothing": 1}
