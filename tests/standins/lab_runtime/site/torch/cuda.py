"""How many GPUs this container was given, from its device nodes and variables; there is no CUDA to ask."""

from __future__ import annotations

import os
import re
from pathlib import Path


def device_count() -> int:
    """Return the number of GPUs that the container sees."""
    given = len([node for node in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name)])
    named = os.environ.get("NVIDIA_VISIBLE_DEVICES", "void")
    if not given and named not in ("", "void", "none"):
        # Without device nodes (a stand-in of the container toolkit makes none) the variable is all there is.
        given = int(os.environ.get("PDSTACK_LAB_GPUS", "1")) if named == "all" else len(named.split(","))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given if chosen is None else min(given, len([word for word in chosen.split(",") if word.strip()]))


def is_available() -> bool:
    """Return whether there is a GPU."""
    return device_count() > 0
