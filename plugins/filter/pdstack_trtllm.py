"""Filters of engine trtllm. A shim: the logic and its tests are in src/pdstack/deploy/trtllm.py and modelfiles.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from pdstack.deploy import trtllm  # needs the path above


def block_size(defaults: Any, site: Any) -> int:
    return trtllm.block_size(defaults, site)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "pdstack_trtllm_worker": trtllm.rendered,
            "pdstack_trtllm_frontend": trtllm.frontend,
            "pdstack_trtllm_block_size": block_size,
            "pdstack_trtllm_inflight": trtllm.inflight,
        }
