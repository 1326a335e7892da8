from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from pdstack.deploy import survey


def test_addresses_of_proc() -> None:
    assert survey.address("0100007F") == "127.0.0.1"
    assert survey.address("00000000") == "0.0.0.0"
    assert survey.address("00000000000000000000000001000000") == "::1"


def test_only_listening_sockets_count() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1\n"
        "   1: 0100007F:1F41 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0        0 112 1\n"
    )
    assert survey.listening(table) == {"111": ("127.0.0.1", 8000)}


def test_this_process_is_found_by_the_port_it_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = survey.survey(["/nonexistent/deep/down"])
        port = server.getsockname()[1]
    entry = next(entry for entry in found["listeners"] if entry["port"] == port)
    assert entry["pid"] == os.getpid()
    assert entry["address"] == "127.0.0.1"
    assert found["disk_mib"]["/nonexistent/deep/down"] > 0
    assert found["present"] == {"/nonexistent/deep/down": False}
    assert 0 < found["memory"]["available_mib"] <= found["memory"]["total_mib"]


def test_it_runs_from_standard_input_without_the_package() -> None:
    source = Path(survey.__file__).read_text()
    result = subprocess.run(
        [sys.executable, "-I", "-", "/"], input=source, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(result.stdout)["present"] == {"/": True}


def test_ancestors_end_at_the_first_process() -> None:
    chain = survey.ancestors(Path("/proc"), os.getpid())
    assert chain[0] == os.getpid()
    assert chain[1:2] == [os.getppid()] or os.getppid() <= 1
