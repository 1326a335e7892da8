"""An inventory of simulated GPU hosts: fake trees, asked over Ansible's local connection."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tests.standins import fakehost


def write(root: Path, hosts: Mapping[str, Mapping[str, Any]], **variables: Any) -> Path:
    """Write an inventory of engine trtllm under `root` and return its file.

    `hosts` is name -> what the host is to `fakehost.make` (host variables in its entry `variables`). The first host
    carries etcd, NATS and the frontend as well; the first half of the hosts prefills, the rest decodes.
    """
    names = list(hosts)
    entries = {}
    for index, (name, what) in enumerate(hosts.items()):
        given = dict(what)
        extra = given.pop("variables", {})
        given = {"nics": 2, "interfaces": {"eth0": (f"10.0.0.{index + 1}", 9000)}} | given
        entries[name] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "pdstack_probe_root": str(fakehost.make(root / "hosts" / name, **given)),
            "pdstack_address": f"10.0.0.{index + 1}",
            # The network is that of this machine, where none of the addresses is.
            "doctor_network": False,
            "gpu_count": 2,
            "kv_interface": "eth0",
            "kv_net_devices": ["mlx5_0:1", "mlx5_1:1"],
            "prefill_workers": [{"gpus": [0]}],
            "decode_workers": [{"gpus": [1]}],
            **extra,
        }
    half = max(1, len(names) // 2)
    group = {
        "etcd": names[:1], "nats": names[:1], "frontend": names[:1], "prefill": names[:half],
        "decode": names[half:] or names,
    }  # fmt: skip
    inventory = {
        "all": {
            "vars": {"pdstack_name": "fleet", "engine": "trtllm", "kv_fabric": "ib", "model_source": "hub",
                     "model_ref": "Qwen/Qwen3-8B", "model_revision": "0" * 40, **variables},
            "hosts": entries,
            "children": {key: {"hosts": dict.fromkeys(members)} for key, members in group.items()},
        }
    }  # fmt: skip
    path = root / "hosts.yml"
    path.write_text(yaml.safe_dump(inventory, sort_keys=False))
    return path
