"""UCX's own words, of a real exchange between two processes (UCX 1.19) and as later releases print them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdstack.deploy import ucx_log

# What TensorRT-LLM prints; the tables' lines of two ranks lie between each other as in a container's log.
TWO_RANKS = """\
[TensorRT-LLM][INFO] CacheTransBufferManager: mMaxNumTokens:8192, mRecvBufferCount:2, mSendBufferCount:1
[1700000000.1] [p-0:71:0]   +---------------------------+-------------------------------------------------------+
[1700000000.1] [p-0:72:0]   +---------------------------+-------------------------------------------------------+
[1700000000.1] [p-0:71:0]   | ucp inter-node cfg#1 | tagged message by ucp_tag_send*(multi) from cuda/GPU0 memory     |
[1700000000.1] [p-0:72:0]   | ucp inter-node cfg#1 | tagged message by ucp_tag_send*(multi) from host memory          |
[1700000000.1] [p-0:71:0]   |      0..512 | eager short                                   | rc_mlx5/mlx5_0:1           |
[1700000000.1] [p-0:72:0]   |      0..inf | eager                                         | tcp/eth0                   |
[1700000000.1] [p-0:71:0]   | 513..inf | (?) rendezvous | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
"""
LATER = """\
[1.1] [h:1 :0]   | d-1 inter-node cfg#1                 |
[1.1] [h:1 :0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.1] [h:1 :0]   | Range  |    Description     | Config |
[1.1] [h:1 :0]   |          0 | short              | tcp/lo |
[1.1] [h:1 :0]   | 1..16K | software emulation | tcp/eth0 |
[1.1] [h:1 :0]   | 16385..inf | zero-copy | rc_mlx5/mlx5_0:1 |
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], environment: dict[str, str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        # Listening, seen without connecting: a connection would be the client.
        while f":{port:04X}" not in Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text():
            assert time.monotonic() < deadline, "ucx_perftest does not listen"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def exchange(transports: str, test: str, **more: str) -> str:
    """Let two ucx_perftest of the wheel exchange 1 MiB messages and return what the client logged."""
    found = importlib.util.find_spec("libucx")
    assert found is not None
    assert found.submodule_search_locations
    root, port = Path(next(iter(found.submodule_search_locations))), free_port()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("UCX_")}
    environment = {**plain, "LD_LIBRARY_PATH": str(root / "lib"), "UCX_TLS": transports, "UCX_PROTO_INFO": "y", **more}
    command = [str(root / "bin/ucx_perftest"), "-p", str(port)]
    words = ["-t", test, "-s", "1048576", "-n", "3", "-w", "1", "127.0.0.1"]
    with server(command, environment, port):
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("transports", "environment", "wanted"),
    [
        ("tcp,self", {"UCX_NET_DEVICES": "lo"}, "tcp"),
        ("cma,sm,self", {"UCX_MM_ERROR_HANDLING": "y"}, "cma"),
    ],
)
def test_the_transport_of_a_real_read_is_found(transports: str, environment: dict[str, str], wanted: str) -> None:
    log = exchange(transports, "ucp_get", **environment)
    assert ucx_log.kv_transports(log) == (wanted,)
    assert ucx_log.by_memory(ucx_log.choices(log), 1 << 20)["host"][0] == wanted
    assert any("ucp_get" in choice.operation and choice.low <= 1 << 20 for choice in ucx_log.choices(log))


def test_messages_of_host_memory_are_not_kv() -> None:
    log = exchange("tcp,self", "tag_bw", UCX_NET_DEVICES="lo")
    assert ucx_log.choices(log)
    assert ucx_log.kv_transports(log) == ()


def test_the_tables_of_two_ranks_are_told_apart() -> None:
    assert ucx_log.kv_transports(TWO_RANKS) == ("rc_mlx5",)
    assert ucx_log.by_memory(ucx_log.choices(TWO_RANKS)) == {"cuda": ("rc_mlx5",), "host": ("tcp",)}


def test_the_title_on_two_lines_and_the_size_s_row() -> None:
    assert ucx_log.kv_transports(LATER) == ("rc_mlx5",)
    assert ucx_log.kv_transports(LATER, 4096) == ("tcp",)


@pytest.mark.parametrize("log", ["", "| nothing | of | ucx |\n", "[1.1] [h:1:0]   | 0..inf | zero-copy | tcp/lo |\n"])
def test_a_log_that_says_nothing_gives_nothing(log: str) -> None:
    assert ucx_log.choices(log) == []
    assert ucx_log.kv_transports(log) == ()
    assert ucx_log.transceiver(log) is None


def test_the_last_transceiver_counts() -> None:
    ucx = "[TRT-LLM] [I] Using UCX kv-cache transceiver. If your devices are not in the same domain, please consider\n"
    nixl = "[TensorRT-LLM][INFO] NixlTransferAgent::NixlTransferAgent mAddress: 10.0.0.1:4242\n"
    assert ucx_log.transceiver(ucx) == "ucx"
    assert ucx_log.transceiver(nixl) == "nixl"
    assert ucx_log.transceiver(ucx + nixl) == "nixl"
    assert ucx_log.buffer_tokens(TWO_RANKS) == 8192


def test_complaints_are_told_once() -> None:
    line = "[1.1] [h:1:0]  parser.c:2359 UCX  WARN  unused environment variable: UCX_TSL (maybe: UCX_TLS?)\n"
    assert ucx_log.complaints(line * 3) == ["unused environment variable: UCX_TSL (maybe: UCX_TLS?)"]


def test_transports_of_a_host_from_both_of_ucx_info_s_answers() -> None:
    listing = "#      Transport: tcp\n#         Device: eth0\n#      Transport: tcp\n#         Device: lo\n"
    assert ucx_log.devices(listing) == {"tcp": ["eth0", "lo"]}
    warning = "x.c:1 UCX WARN  transport 'which' is not available, please use one or more of: rc, tcp"
    assert list(ucx_log.devices(warning)) == ["rc", "tcp"]
