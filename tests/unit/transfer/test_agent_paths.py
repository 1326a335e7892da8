"""The own paths in the agent: two real processes, each path, and every way in which prefill can go wrong."""

from __future__ import annotations

import logging
import random
import signal
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from transfer_pair import LAYOUT, Agent, until

from pdstack.transfer import BackendUnavailable, ClusterKey, KVLayout, PathUnavailable, ProtocolError, Role
from pdstack.transfer.channel import Identity
from pdstack.transfer.layout import allocate_pool
from pdstack.transfer.paths import PATHS, Offers, read_offers
from pdstack.transfer.paths.base import paths_of
from pdstack.transfer.paths.pools import shared_pool
from pdstack.transfer.store import HostStore

# Blocks of 512 KiB, 128 MiB in all: long enough for prefill to be ended in the middle of reading them.
LARGE = {**LAYOUT, "num_layers": 32}
SMALL = KVLayout(num_blocks=8, num_layers=2, block_size=16, num_kv_heads=2, head_dim=32)
IDENTITY = Identity("prefill-0", "run-1", Role.PREFILL, "ns/model", ClusterKey(b"k" * 32))
# What a read may end with if prefill was killed or frozen under it; anything else must be the right bytes.
HONEST = ("PeerUnreachable", "ReadFailed", "ReadTimeout", "ChecksumMismatch")

Start = Callable[..., Agent]


@pytest.fixture
def start() -> Iterator[Start]:
    agents: list[Agent] = []

    def begin(role: str, path: str, **options: Any) -> Agent:
        agents.append(Agent(role, "ucx", path=path, **options))
        return agents[-1]

    yield begin
    for agent in agents:
        agent.abandon()


def pair(start: Start, path: str, decode_path: str = "", **options: Any) -> tuple[Agent, Agent]:
    prefill = start("prefill", path, **options)
    decode = start("decode", decode_path or path, **options)
    prefill.call("fill", 1)
    return prefill, decode


@pytest.mark.parametrize("path", [*PATHS, "auto"])
def test_reads_random_blocks_and_exits_cleanly(start: Start, path: str) -> None:
    prefill, decode = pair(start, path)
    taken = "shared" if path == "auto" else path
    generator = random.Random(7)
    for number, count in enumerate((1, 17, 256)):
        source, target = generator.sample(range(256), count), generator.sample(range(256), count)
        report = decode.call("fetch", prefill.call("export", f"r{number}", source, count * 16), target)
        assert report.get("error") is None, report
        assert report["bytes"] == count * 65536
        assert (report["backend"], report["transport"]) == ("path", taken)
        for here, there in zip(source[:20], target[:20], strict=True):
            assert prefill.call("block", here) == decode.call("block", there)
    until(lambda: len(prefill.call("releases")) == 3, "three releases")
    assert {reason for _, reason in prefill.call("releases")} == {"read"}
    assert prefill.call("stats")["paths"] == (list(PATHS) if path == "auto" else [path])
    stats = decode.call("stats")
    assert (stats["backend"], stats["path"], stats["peers"][0]["transports"]) == ("ucx", path, [taken])
    assert stats["peers"][0]["paths"] == (["shared", "cma", "backend", "stream"] if path == "auto" else [path])
    # The memory changed after the export: decode must not take it for the prompt's KV.
    wire = prefill.call("export", "corrupted", [1, 2, 3])
    prefill.call("poke", 2, 42.0)
    outcome = decode.call("fetch", wire, [1, 2, 3])
    assert (outcome["error"], outcome["code"]) == ("ChecksumMismatch", "checksum")
    until(lambda: prefill.call("releases")[3:] == [("corrupted", "failed")], "the release")
    assert (decode.close(), prefill.close()) == (0, 0)


@pytest.mark.parametrize("path", PATHS)
def test_kill_of_prefill_among_reads_never_gives_wrong_bytes(start: Start, path: str) -> None:
    prefill, decode = pair(start, path, layout=LARGE)
    assert decode.call("fetch", prefill.call("export", "warm", [0]), [0])["transport"] == path
    exported = [prefill.call("block", number) for number in range(256)]
    shares = [list(range(first + 31, first - 1, -1)) for first in range(0, 256, 32)]
    wires = [prefill.call("export", f"r{number}", blocks) for number, blocks in enumerate(shares)]
    decode.call("fill", 99)
    for wire, blocks in zip(wires, shares, strict=True):
        decode.call("begin_fetch", wire, blocks)
    soon(lambda: len(prefill.call("releases")) > 1, "the end of the first read")
    prefill.kill()
    outcomes = [decode.call("end_fetch", f"r{number}") for number in range(8)]
    for number, (outcome, blocks) in enumerate(zip(outcomes, shares, strict=True)):
        if "error" in outcome:
            assert outcome["error"] in HONEST, outcome
            decode.call("settled", f"r{number}")
        else:
            assert all(decode.call("block", block) == exported[block] for block in blocks)
    assert "error" not in outcomes[0]
    until(lambda: not decode.call("stats")["peers"], "the loss of prefill")
    assert decode.call("stats")["quarantined_blocks"] == 0
    # Another run under the same name serves the same decode worker.
    again = start("prefill", path, layout=LARGE)
    again.call("fill", 2)
    report = decode.call("fetch", again.call("export", "next", [5]), [6])
    assert report.get("error") is None, report
    assert again.call("block", 5) == decode.call("block", 6)
    assert (decode.close(), again.close()) == (0, 0)


@pytest.mark.parametrize("path", PATHS)
def test_frozen_prefill_never_writes_later(start: Start, path: str) -> None:
    prefill, decode = pair(start, path, layout=LARGE, read_timeout_s=1.0, heartbeat_s=60.0)
    decode.call("fetch", prefill.call("export", "warm", [0]), [0])
    exported = [prefill.call("block", number) for number in range(256)]
    wire = prefill.call("export", "big", list(range(255, -1, -1)), 256)
    decode.call("fill", 98)
    decode.call("begin_fetch", wire, list(range(256)))
    soon(lambda: prefill.call("stats")["exports"]["granted"] or prefill.call("releases")[1:], "the grant")
    prefill.kill(signal.SIGSTOP)
    outcome = decode.call("end_fetch", "big")
    if path == "stream":
        assert outcome["error"] in ("ReadTimeout", "ReadFailed"), outcome
        decode.call("settled", "big")
    else:
        # Nothing of prefill runs in such a read, so it ends as if nothing had happened.
        assert outcome.get("error") is None, outcome
        assert all(decode.call("block", number) == exported[255 - number] for number in range(256))
    decode.call("fill", 99)
    before = [decode.call("block", number) for number in range(1, 256, 5)]
    prefill.kill(signal.SIGCONT)
    until(lambda: prefill.call("releases")[1:], "the release")
    assert decode.call("fetch", prefill.call("export", "next", [1]), [0]).get("error") is None
    assert [decode.call("block", number) for number in range(1, 256, 5)] == before
    assert decode.call("block", 0) == exported[1]
    assert (decode.close(), prefill.close()) == (0, 0)


@pytest.mark.parametrize(("offered", "wanted"), [("backend", "shared"), ("cma", "stream")])
def test_a_path_that_cannot_be_had_is_an_error_and_no_other_is_taken(start: Start, offered: str, wanted: str) -> None:
    prefill, decode = pair(start, offered, wanted)
    outcome = decode.call("fetch", prefill.call("export", "r", [1]), [1])
    assert (outcome["error"], outcome["code"]) == ("PathUnavailable", "path_unavailable")
    assert "prefill-0 does not offer it" in outcome["text"]
    assert decode.call("stats")["failures"] == 1
    assert decode.call("stats")["bytes"] == 0


@pytest.mark.parametrize(
    ("offered", "order", "taken"),
    [
        ("cma", [], ("path", "cma")),
        ("backend", [], ("ucx", "cma")),
        ("stream", [], ("ucx", "cma")),
        ("stream", ["stream"], ("path", "stream")),
        ("auto", ["cma", "stream"], ("path", "cma")),
    ],
)
def test_auto_takes_the_first_in_the_measured_order(
    start: Start, offered: str, order: list[str], taken: tuple[str, str]
) -> None:
    prefill = start("prefill", offered)
    decode = start("decode", "auto", order={"prefill-0": order})
    prefill.call("fill", 1)
    report = decode.call("fetch", prefill.call("export", "r", [1]), [2])
    assert (report["backend"], report["transport"]) == taken
    assert prefill.call("block", 1) == decode.call("block", 2)


def test_auto_looks_at_the_other_paths_now_and_then(start: Start) -> None:
    prefill = start("prefill", "auto", layout=LARGE)
    decode = start("decode", "auto", layout=LARGE, recheck_every=2)
    prefill.call("fill", 1)
    used = []
    for number in range(12):
        blocks = list(range(8 * number, 8 * number + 8))
        report = decode.call("fetch", prefill.call("export", f"r{number}", blocks), blocks)
        assert report.get("error") is None, report
        used.append((report["backend"], report["transport"]))
    # The path in use may change on the way, for what is measured here is real.
    assert {("path", "shared"), ("path", "cma"), ("path", "stream"), ("ucx", "cma")} <= set(used)
    rates = decode.call("stats")["peers"][0]["bytes_per_second"]
    assert set(rates) == {"shared", "cma", "backend", "stream"}
    assert all(prefill.call("block", block) == decode.call("block", block) for block in range(0, 96, 7))


def test_prefill_with_paths_still_serves_over_its_backend(start: Start) -> None:
    prefill, decode = pair(start, "auto", "backend")
    report = decode.call("fetch", prefill.call("export", "r", [1]), [2])
    assert (report["backend"], report["transport"]) == ("ucx", "cma")
    assert prefill.call("block", 1) == decode.call("block", 2)


def test_a_shared_pool_is_found_from_any_view_of_its_array() -> None:
    pool = allocate_pool(SMALL, "shared")
    assert (pool.shape, pool.dtype, bool(pool.any())) == (SMALL.shape, np.dtype("float32"), False)
    shared = shared_pool(pool)
    assert shared.region.address == pool.ctypes.data
    view = pool.view(np.uint8)
    del pool, shared
    assert shared_pool(view).nbytes == view.nbytes
    with pytest.raises(BackendUnavailable, match="allocate_pool"):
        shared_pool(view[:1])
    with pytest.raises(BackendUnavailable, match="allocate_pool"):
        shared_pool(allocate_pool(SMALL))


def offer(path: str, pool: Any) -> Offers:
    return Offers.open(
        path, HostStore(SMALL, pool), IDENTITY, listen_host="127.0.0.1", advertise="localhost", patience_s=1.0
    )


def test_private_memory_is_not_offered_as_shared(caplog: pytest.LogCaptureFixture) -> None:
    pool = allocate_pool(SMALL, "cma")
    with pytest.raises(PathUnavailable, match=r"kv_transfer_path is 'shared'.*allocate_pool"):
        offer("shared", pool)
    with caplog.at_level(logging.WARNING):
        offers = offer("auto", pool)
    assert offers.names == ["cma", "stream"]
    assert "not offered over path shared" in caplog.text
    assert b'"host": "localhost"' in read_offers(offers.wire(), "p")["stream"]
    offers.close()


def test_the_backend_alone_offers_no_path() -> None:
    assert offer("backend", allocate_pool(SMALL)).wire() == {}
    assert [paths_of(choice) for choice in ("backend", "cma")] == [("backend",), ("cma",)]
    assert set(paths_of("auto")) == {"backend", *PATHS}


def test_offers_are_checked_when_they_arrive() -> None:
    good = b64encode(b"{}").decode()
    assert read_offers(None, "p") == {}
    assert read_offers({"stream": good, "of a later release": 1}, "p") == {"stream": b"{}"}
    for bad in ([], "x", {"cma": 1}, {"cma": "?"}, {"shared": "é"}, {"stream": good * 4096}):
        with pytest.raises(ProtocolError, match="p's"):
            read_offers(bad, "p")


def soon(condition: Callable[[], Any], what: str, timeout_s: float = 15.0) -> None:
    """Like `until`, but without a pause: what follows must come in the middle of a read."""
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit, f"waited {timeout_s} s in vain for {what}"
