"""Inputs with images; the lab serves text."""

from __future__ import annotations

from typing import Any


def default_multimodal_input_loader(**_: Any) -> Any:
    """Refuse."""
    raise NotImplementedError("the lab's runtime image serves text only")
