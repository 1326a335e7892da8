"""These run where torch and Triton are: on a GPU, or on host memory with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest

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
        elif INTERPRETED and item.path.name == "test_two_gpu_processes.py":
            item.add_marker(pytest.mark.skip(reason="CUDA IPC needs a GPU; Triton's interpreter has none"))
