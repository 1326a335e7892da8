"""Filters of engine trtllm. A shim: the logic and its tests are in src/pdstack/deploy/trtllm.py and modelfiles.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import modelfiles, trtllm  # needs the path above


def block_size(defaults: Any, site: Any) -> int:
    return trtllm.block_size(defaults, site)


def differences(hosts: Sequence[str], hostvars: Any) -> list[str]:
    looks = {host: (hostvars[host].get("__model__r_files") or {}).get("stdout") for host in hosts}
    return modelfiles.different({host: json.loads(text) for host, text in looks.items() if text})


def docker_variables(environment: Mapping[str, Any]) -> list[str]:
    return [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_trtllm_worker": trtllm.rendered,
            "pdstack_trtllm_frontend": trtllm.frontend,
            "pdstack_trtllm_block_size": block_size,
            "pdstack_model_differences": differences,
            "pdstack_docker_variables": docker_variables,
            "pdstack_trtllm_answering": trtllm.answering,
            "pdstack_trtllm_inflight": trtllm.inflight,
        }
