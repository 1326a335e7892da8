"""Imported by `dynamo.trtllm` for models with images only."""

from __future__ import annotations

from typing import Any


class AutoConfig:
    """Refuses: the lab serves text."""

    @staticmethod
    def from_pretrained(name: str, **_: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(f"{name}: the lab's runtime image serves text only, wanted --modality text")


class PreTrainedTokenizerBase:
    """Named by an example of a logits processor."""
