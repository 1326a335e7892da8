"""The qualification of a pair with GPU pools, by its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from store_pair import SRC


def test_a_pair_is_measured_against_a_device_copy_and_cuda_ipc_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = [sys.executable, "-m", "pdstack.transfer.qualify", "--local", "--memory", "gpu", "--json", str(out)]
    done = subprocess.run(
        [*words, "--sizes", "32K", "2M", "--bytes", "64M", "--rounds", "3", "--want", "cuda_ipc"],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": f"{SRC}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pair = json.loads(out.read_text())["pairs"][0]
    print(done.stdout)
    measured = {one["path"]: one for one in pair["paths"]}
    assert set(measured) == {"cuda_ipc", "staged"}
    for one in measured.values():
        assert (one["error"], one["wrong"], len(one["sizes"])) == (None, 0, 2)
    fast, slow = (measured[name]["sizes"][1]["gbps"]["median"] for name in ("cuda_ipc", "staged"))
    assert fast > slow
