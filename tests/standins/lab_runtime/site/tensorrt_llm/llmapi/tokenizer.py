"""The tokenizer as far as the health check's payload needs it; Dynamo's frontend is what makes tokens of text."""

from __future__ import annotations

import json
from pathlib import Path


class TransformersTokenizer:
    """Knows the first token of a text."""

    def __init__(self, bos_token_id: int | None) -> None:
        self.tokenizer = self
        self.bos_token_id = bos_token_id


def tokenizer_factory(model: str) -> TransformersTokenizer:
    """Make the tokenizer of a model directory."""
    file = Path(model) / "config.json"
    found = json.loads(file.read_text()).get("bos_token_id") if file.is_file() else None
    return TransformersTokenizer(found if isinstance(found, int) else None)
