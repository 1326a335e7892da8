"""Filters of the verification. A shim: the logic and its tests are in src/pdstack/deploy/trtllm_proof.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import trtllm_proof  # needs the path above

HOST_VARIABLES = ("kv_fabric", "kv_net_devices", "kv_interface")


def expected(topology: Any, hostvars: Any, profiles: Any, backend: str, engine: dict[str, Any]) -> dict[str, Any]:
    hosts = {worker["host"] for worker in topology["workers"]}
    known = {host: {key: hostvars[host].get(key) for key in HOST_VARIABLES} for host in hosts}
    return trtllm_proof.expected(topology, known, profiles, backend=backend, engine=engine)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"pdstack_trtllm_expected": expected}
