from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

# pytest's importlib mode leaves it alone; helper modules lie beside the tests.
sys.path.insert(0, str(Path(__file__).parent))
COMMON = Path(__file__).resolve().parents[3] / "inventories/common/group_vars/all"
GROUPS = ("etcd", "nats", "frontend", "prefill", "decode")


class Inventory:
    """Groups, hosts and settings as the plugin hands them over, with the values of inventories/common."""

    def __init__(self) -> None:
        self.common: dict[str, Any] = {}
        for name in ("main", "trtllm", "fabrics", "versions"):
            self.common |= yaml.safe_load((COMMON / f"{name}.yml").read_text())

    def settings(self, **changed: Any) -> dict[str, Any]:
        """pdstack_settings as Ansible renders it, with some settings changed."""
        return {key: copy.deepcopy(self.common[key]) for key in self.common["pdstack_settings"]} | changed

    def hosts(self, *names: str, **variables: Any) -> dict[str, dict[str, Any]]:
        """Hosts (one, `a`, if none is named) with the default variables, and `variables` on each."""
        keys = ("engine_settings", "kv_fabric", "kv_transfer_backend", "prefill_workers", "decode_workers")
        defaults = {key: self.common[key] for key in keys}
        # Several hosts are not all this machine.
        connection = {"ansible_connection": "local" if len(names) < 2 else "ssh"}
        return {name: copy.deepcopy(defaults) | connection | variables for name in names or ("a",)}

    def groups(self, **changed: list[str]) -> dict[str, list[str]]:
        """Groups with host `a` in each, or the hosts named."""
        return {name: ["a"] for name in GROUPS} | changed


@pytest.fixture
def inventory() -> Inventory:
    return Inventory()
