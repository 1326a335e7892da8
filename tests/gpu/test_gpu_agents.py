"""Two agents, each a process with its pool in GPU memory: real tickets, every byte compared, faults."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_pair import Agent

# Blocks of 64 KiB, 64 MiB in all.
LAYOUT = {"num_blocks": 1024, "num_layers": 4, "block_size": 16, "num_kv_heads": 4, "head_dim": 64, "dtype": "float16"}
SIZE = 4 * 2 * 16 * 4 * 64 * 2
SEEDS = {"prefill": 1, "decode": 2}


class GpuAgent(Agent):
    script = Path(__file__).with_name("gpu_agent_process.py")

    def __init__(self, role: str, **config: Any) -> None:
        super().__init__(role, "ucx", layout=LAYOUT, **{"path": "auto", **config})
        self.call("fill", SEEDS[role])


class Both:
    def __init__(self, **config: Any) -> None:
        self.prefill, self.decode = GpuAgent("prefill", **config), GpuAgent("decode", **config)

    def end(self) -> None:
        self.prefill.abandon()
        self.decode.abandon()


@pytest.fixture(scope="module", params=["auto", "staged"])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    made = Both(path=request.param)
    made.over = "staged" if request.param == "staged" else "cuda_ipc"  # type: ignore[attr-defined]  # for the tests
    yield made
    made.end()


def content(role: str) -> Any:
    return np.random.default_rng(SEEDS[role]).integers(0, 256, (LAYOUT["num_blocks"], SIZE), dtype=np.uint8)


def pool_of(agent: Agent) -> Any:
    return np.frombuffer(agent.call("everything"), np.uint8).reshape(-1, SIZE)


def tables(seed: int, count: int = 700) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    return rng.permutation(1024)[:count].tolist(), rng.permutation(1024)[:count].tolist()


def test_every_byte_arrives_and_the_blocks_are_freed(both: Both) -> None:
    both.prefill.call("fill", SEEDS["prefill"])
    both.decode.call("fill", SEEDS["decode"])
    source, target = tables(1)
    report = both.decode.call("fetch", both.prefill.call("export", "r1", source), target)
    assert report.get("error") is None, report
    assert (report["backend"], report["transport"]) == ("path", both.over)  # type: ignore[attr-defined]
    assert (report["bytes"], report["checksum_seconds"], report["first_token"]) == (700 * SIZE, 0.0, 7)
    wanted = content("decode")
    wanted[target] = content("prefill")[source]
    assert np.array_equal(pool_of(both.decode), wanted)
    assert np.array_equal(pool_of(both.prefill), content("prefill"))
    assert ["r1", "read"] in [list(each) for each in both.prefill.call("releases")]


def test_blocks_come_while_the_prompt_is_computed(both: Both) -> None:
    both.prefill.call("fill", SEEDS["prefill"])
    both.decode.call("fill", SEEDS["decode"])
    source, target = tables(2, 96)
    ticket = both.prefill.call("begin_export", "r2", source, 6, 0.05, 11)
    report = both.decode.call("fetch", ticket, target)
    assert report.get("error") is None, report
    assert report["first_token"] == 11
    there = pool_of(both.prefill)
    assert np.array_equal(pool_of(both.decode)[target], there[source])


def test_a_bit_that_flipped_after_hashing_is_noticed_and_the_fetch_fails(both: Both) -> None:
    source, target = tables(3, 200)
    ticket = both.prefill.call("export", "r3", source)
    both.prefill.call("flip", source[77])
    report = both.decode.call("fetch", ticket, target)
    assert (report["error"], report["quarantined"]) == ("ChecksumMismatch", False)
    assert "1 of 200 blocks" in report["text"]
    # The next one is fine.
    ticket = both.prefill.call("export", "r4", source)
    assert "error" not in both.decode.call("fetch", ticket, target)


def test_a_cancelled_fetch_leaves_its_blocks_alone(both: Both) -> None:
    source, target = tables(4)
    both.decode.call("begin_fetch", both.prefill.call("export", "r5", source), target)
    both.decode.call("cancel_fetch", "r5")
    both.decode.call("clear")
    time.sleep(0.3)  # whatever could still come
    assert not pool_of(both.decode).any()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("path", ["cuda_ipc", "staged"])
def test_prefill_is_lost_in_the_middle_of_reads(path: str, how: signal.Signals) -> None:
    made = Both(path=path, read_timeout_s=3.0, heartbeat_s=0.2, resume_s=0.5)
    try:
        source, target = tables(5, 1024)
        for number in range(3):  # so that everything is connected and compiled
            ticket = made.prefill.call("export", f"w{number}", source)
            assert "error" not in made.decode.call("fetch", ticket, target)
        tickets = [made.prefill.call("export", f"k{number}", source) for number in range(4)]
        for ticket in tickets:
            made.decode.post("begin_fetch", ticket, target)
        made.prefill.kill(how)
        for _ in tickets:
            made.decode.answer()
        ends = [made.decode.call("end_fetch", f"k{number}") for number in range(4)]
        for number, end in enumerate(ends):
            if "error" in end:
                assert end["code"] in ("peer_unreachable", "read_failed", "read_timeout", "gpu_failed"), end
                made.decode.call("settled", f"k{number}")
        assert any("error" in end for end in ends)
        made.decode.call("clear")
        if how == signal.SIGSTOP:
            made.prefill.kill(signal.SIGCONT)
        time.sleep(0.5)  # whatever could still come
        assert not pool_of(made.decode).any()
        # Decode is well, and serves the next prefill.
        made.prefill.abandon()
        made.prefill = GpuAgent("prefill", path=path)
        assert "error" not in made.decode.call("fetch", made.prefill.call("export", "n", source), target)
        assert np.array_equal(pool_of(made.decode)[target], content("prefill")[source])
    finally:
        made.end()


class Contained(GpuAgent):
    """Process 1 of a PID namespace of its own, as in a container."""

    wrapper = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_two_containers_whose_processes_have_one_number_take_the_path_staged() -> None:
    """The driver does not map memory between them (`gpu.ipc`); auto finds that out and goes on."""
    prefill, decode = Contained("prefill"), Contained("decode")
    source, target = tables(6)
    report = decode.call("fetch", prefill.call("export", "c", source), target)
    assert (report.get("error"), report["transport"]) == (None, "staged")
    assert "over shared" in report["transport_detail"]
    assert "in place" in report["transport_detail"]
    assert np.array_equal(pool_of(decode)[target], content("prefill")[source])
    prefill.abandon()
    decode.abandon()
    alone = Contained("decode", path="cuda_ipc")
    prefill = Contained("prefill", path="cuda_ipc")
    report = alone.call("fetch", prefill.call("export", "d", source), target)
    assert (report["error"], report["code"]) == ("PathUnavailable", "path_unavailable")
    assert "--pid=host" in report["text"]
    prefill.abandon()
    alone.abandon()


def test_host_memory_and_gpu_memory_are_not_mixed() -> None:
    prefill = GpuAgent("prefill")
    decode = Agent("decode", "ucx", layout=LAYOUT, path="cma")
    report = decode.call("fetch", prefill.call("export", "m", [1, 2]), [3, 4])
    assert (report["error"], report["code"]) == ("LayoutMismatch", "hashing")
    prefill.abandon()
    decode.abandon()


def test_a_path_of_host_memory_is_refused_when_the_agent_is_created() -> None:
    with pytest.raises(RuntimeError, match="PathUnavailable: kv_transfer_path is 'stream' and the KV pool lies in GPU"):
        GpuAgent("prefill", path="stream")
