"""CUDA IPC between real processes: what is mapped, what is refused, and what a killed exporter leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdstack.transfer import BackendUnavailable
from pdstack.transfer.gpu import copy, ipc
from pdstack.transfer.gpu.needs import gpu

SRC = Path(__file__).resolve().parents[2] / "src"
SIZE, COUNT = 32768, 2048
EXPORTER = f"""
import sys, torch
from pdstack.transfer.gpu import copy, ipc
before = torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")
pool = torch.arange({SIZE * COUNT // 8}, device="cuda")
torch.cuda.synchronize()
print(ipc.export(*copy.pool_of(pool)).to_json(), flush=True)
sys.stdin.read()
"""


@contextmanager
def exporter(*wrapper: str) -> Iterator[tuple[subprocess.Popen[str], ipc.Export]]:
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", EXPORTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{SRC}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    try:
        assert process.stdout
        yield process, ipc.Export.from_json(process.stdout.readline())
    finally:
        process.communicate()


def read(mapping: ipc.Mapping, checksum: bool = False) -> tuple[Any, Any]:
    torch = gpu().torch
    target = torch.full((SIZE * COUNT // 8,), -1, device="cuda")
    places = np.random.default_rng(1).permutation(COUNT)
    a, b = copy.table(places, COUNT, "source"), copy.table(places, COUNT, "target", unique=True)
    sums = copy.copy_blocks(
        copy.Pool(mapping.address, mapping.nbytes), copy.pool_of(target), a, b, SIZE, checksum=checksum
    )
    torch.cuda.synchronize()
    return target, sums


def test_a_pool_within_an_allocation_is_mapped_and_read() -> None:
    with exporter() as (_, exported):
        mapping = ipc.Mapping(exported)
        target, sums = read(mapping, checksum=True)
        assert gpu().torch.equal(target, gpu().torch.arange(SIZE * COUNT // 8, device="cuda"))
        assert len(gpu().torch.unique(sums)) == COUNT
        mapping.close()
        mapping.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_exporter_leaves_our_blocks_alone_after_the_read(number: signal.Signals) -> None:
    torch = gpu().torch
    with exporter() as (process, exported):
        mapping = ipc.Mapping(exported)
        pool = copy.Pool(mapping.address, mapping.nbytes)
        target = torch.full((SIZE * COUNT // 8,), -1, device="cuda")
        blocks = copy.table(range(COUNT), COUNT, "both")
        for _ in range(50):
            copy.copy_blocks(pool, copy.pool_of(target), blocks, blocks, SIZE, checksum=False)
        process.send_signal(number)
        for _ in range(50):
            copy.copy_blocks(pool, copy.pool_of(target), blocks, blocks, SIZE, checksum=False)
        torch.cuda.synchronize()
        # The mapping holds the memory: a dead exporter's bytes are still there.
        assert torch.equal(target, torch.arange(SIZE * COUNT // 8, device="cuda"))
        target.fill_(7)
        mapping.close()
        process.send_signal(signal.SIGCONT)
        torch.cuda.synchronize()
        assert bool((target == 7).all())


def test_our_own_pool_is_refused() -> None:
    pool = gpu().torch.zeros(4096, dtype=gpu().torch.uint8, device="cuda")
    with pytest.raises(BackendUnavailable, match="this process's own"):
        ipc.Mapping(ipc.export(*copy.pool_of(pool)))


def test_memory_that_is_not_on_a_gpu_is_refused() -> None:
    array = np.zeros(4096, np.uint8)
    with pytest.raises(BackendUnavailable, match="no GPU memory of this process"):
        ipc.export(array.ctypes.data, 4096)


def test_a_pool_past_the_end_of_its_allocation_is_refused() -> None:
    pool = gpu().torch.zeros(64 << 20, dtype=gpu().torch.uint8, device="cuda")
    with pytest.raises(BackendUnavailable, match="several allocations"):
        ipc.export(pool.data_ptr(), 1 << 40)


IMPORTER = """
import sys, torch
from pdstack.transfer.gpu import ipc
from pdstack.transfer.errors import BackendUnavailable
torch.zeros(1, device="cuda")
try:
    ipc.Mapping(ipc.Export.from_json(sys.argv[1])).close()
    print("mapped")
except BackendUnavailable as error:
    print(error)
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")
namespaces = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")


@namespaces
def test_another_pid_namespace_is_no_obstacle() -> None:
    with exporter(*NAMESPACE) as (_, exported):
        mapping = ipc.Mapping(exported)
        target, _ = read(mapping)
        assert gpu().torch.equal(target, gpu().torch.arange(SIZE * COUNT // 8, device="cuda"))
        mapping.close()


@namespaces
@pytest.mark.parametrize("known", [True, False])
def test_equal_process_numbers_in_two_pid_namespaces_are(known: bool) -> None:
    """Known beforehand, and, as the reason for that rule, what the driver itself says if it is tried."""
    blind = "" if known else "from pdstack.transfer.gpu import ipc\nipc.obstacle = lambda *_: ''\n"
    with exporter(*NAMESPACE) as (_, exported):
        assert exported.place.pid == 1
        said = subprocess.run(
            [*NAMESPACE, sys.executable, "-c", blind + IMPORTER, exported.to_json()],
            capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": f"{SRC}:{os.environ.get('PYTHONPATH', '')}"},
        ).stdout  # fmt: skip
    assert ("both workers are process 1" if known else "CUDA_ERROR_INVALID_CONTEXT (201)") in said
    assert "--pid=host" in said


def test_a_handle_of_a_process_that_is_gone_is_refused_with_the_reason() -> None:
    with exporter() as (process, exported):
        process.kill()
        process.wait()
        with pytest.raises(BackendUnavailable, match="must live and still hold the pool"):
            ipc.Mapping(exported)
