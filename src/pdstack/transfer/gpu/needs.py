"""Torch and Triton, imported when they are first used: a host without a GPU has neither and needs neither."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any, NamedTuple

from pdstack.transfer.errors import BackendUnavailable


class Needs(NamedTuple):
    """The imported modules, and where tensors live: Triton's interpreter, for tests, works on host memory."""

    torch: Any
    kernels: Any
    device: str


@cache
def gpu() -> Needs:
    """Return torch and our kernels. Raises :class:`BackendUnavailable` if one of the packages is missing."""
    modules = []
    for name in ("torch", "triton"):
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise BackendUnavailable(
                f"GPU blocks are copied by a Triton kernel: importing {name} failed ({error}), wanted torch with CUDA "
                "and triton in this Python; the runtime image has both, elsewhere: pip install torch triton"
            ) from error
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    return Needs(modules[0], importlib.import_module("pdstack.transfer.gpu.kernels"), device)
