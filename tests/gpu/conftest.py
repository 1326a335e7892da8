"""These run where torch and Triton are: on a GPU, or on host memory with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Makes this folder's helper modules and the agents' importable: pytest's importlib mode leaves `sys.path` alone.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "transfer")]
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
    for item in (item for item in items if HERE in item.path.parents):
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif INTERPRETED and item.path.name not in ("test_copies.py", "test_gpu_store.py"):
            item.add_marker(pytest.mark.skip(reason="two processes need a GPU; Triton's interpreter has none"))
