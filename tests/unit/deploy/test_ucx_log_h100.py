"""What UCX 1.19 logged on a real H100: two processes, GPU memory, the environments of our profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdstack.deploy import ucx_log

LOGS = json.loads((Path(__file__).parent / "fixtures" / "ucx_h100.json").read_text())


@pytest.mark.parametrize(
    ("pair", "transports"),
    [
        ("same_host/nixl", ("cuda_ipc",)),
        ("pcie_single/ucx", ("cuda_ipc",)),
        # Two processes on one GPU have no NVLink between them: UCX leaves cuda_ipc and copies through the host.
        ("nvlink_single/nixl", ("sysv",)),
        ("tcp/nixl", ("tcp",)),
    ],
)
def test_the_transport_of_gpu_memory_is_read_from_ucx_own_table(pair: str, transports: tuple[str, ...]) -> None:
    assert ucx_log.kv_transports(LOGS[pair]) == transports


def test_writes_of_host_memory_to_a_gpu_are_not_kv() -> None:
    rows = ucx_log.choices(LOGS["same_host/nixl"])
    assert any("from host memory to cuda" in row.operation for row in rows)
    assert all("from host memory" not in row.operation for row in ucx_log.kv_choices(rows))
