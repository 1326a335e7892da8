"""Gates between versions: which combination of pinned versions and settings cannot work, and why.

The versions are `inventories/common/group_vars/all/versions.yml`; nothing here knows a number that is not a gate.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

# TensorRT-LLM's NIXL transceiver first serves with this release; earlier ones accept the setting and move KV by MPI.
NIXL_NEEDS_TENSORRT_LLM = "1.2.0rc3"


def parse(text: str) -> Version | None:
    """Return `text` as a PEP 440 version, or None when it is none."""
    try:
        return Version(text)
    except InvalidVersion:
        return None


def nixl_allowed(tensorrt_llm: str) -> bool:
    """Return whether this TensorRT-LLM can move KV by NIXL; False also for what is no version."""
    version = parse(tensorrt_llm)
    return version is not None and version >= Version(NIXL_NEEDS_TENSORRT_LLM)
