"""The block size of the model to be served, so that the very blocks are measured that will move."""

from __future__ import annotations

from pathlib import Path

from pdstack.models.hf_config import ModelConfig
from pdstack.transfer.layout import KVLayout


def block_bytes(directory: Path, tokens: int) -> int:
    """Bytes of one block of `tokens` tokens as the reference engine keeps it. Raises ValueError for another model."""
    config = ModelConfig.load(directory)
    return KVLayout(1, config.layers, tokens, config.kv_heads, config.head_dim).block_bytes
