"""These run where torch and Triton are: on a GPU, or on host memory with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Makes this folder's helper modules importable: pytest's importlib mode leaves `sys.path` alone.
sys.path.insert(0, str(Path(__file__).parent))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    try:
        import torch
        import triton  # noqa: F401

        if not INTERPRETED and not torch.cuda.is_available():
            reason = "torch sees no GPU here, and TRITON_INTERPRET=1 is not set"
    except ImportError as error:
        reason = f"needs torch and triton: {error}"
    for item in items:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif INTERPRETED and item.path.name in ("test_two_gpu_processes.py", "test_cuda_ipc_path.py"):
            item.add_marker(pytest.mark.skip(reason="CUDA IPC needs a GPU; Triton's interpreter has none"))
